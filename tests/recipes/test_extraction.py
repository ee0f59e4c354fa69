"""Extraction, against a naive one: hooks on the decoder's own layers, and NumPy in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import fastlock
from fastlock import FastlockError
from fastlock.recipes.activations import Activations
from fastlock.recipes.extraction import extract, rank_heads
from fastlock.recipes.head_scores import EFFECT_SIZE, Scoring, statistics
from fastlock.recipes.pairs import Pair
from fastlock.recipes.recipe import LabelledText, Recipe
from fastlock.recipes.recipe_table import RECIPES
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.helpers.words import PAIRS, ChatWords, Words

extract_module = importlib.import_module("fastlock.recipes.extraction")

PATHS = {"llama": "model.layers.{}.self_attn.o_proj", "gpt2": "transformer.h.{}.attn.c_proj"}
MODELS = {"llama": (4, 32), "gpt2": (4, 16)}  # num_heads, head_dim


def naive_vectors(
    model: Any, kind: str, prompts: list[list[int]], answers: list[list[int]], count: int, start: bool = False
) -> Any:
    """What enters layer l's projection, at the last or first tokens of each answer: [layers][answers] [kept, width]."""
    rows: list[list[Any]] = [[] for _ in range(3)]
    for prompt, answer in zip(prompts, answers, strict=True):
        for layer in range(3):
            seen: list[torch.Tensor] = []
            projection = model.get_submodule(PATHS[kind].format(layer))
            handle = projection.register_forward_hook(lambda _m, args, _out, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(torch.tensor([prompt + answer]))
            handle.remove()
            positions = range(len(prompt), len(prompt) + len(answer))
            positions = positions[:count] if start else positions[-count:]
            rows[layer].append(np.stack([seen[0][0, p].float().numpy() for p in positions]))
    return rows


def ids(text: str) -> list[int]:
    return Words()(text, add_special_tokens=False)["input_ids"]


def naive_rows(model: Any, kind: str, chat: bool, last: int, train_pairs: set[int], start: bool) -> dict[Any, Any]:
    """(layer, head) -> (score, direction, scale), all in float64."""
    prompts, answers, labels, owners = [], [], [], []
    for index, pair in enumerate(PAIRS):
        for label, text in ((1, pair.safe), (0, pair.unsafe)):
            chat_prompt = ids(f"<user> {pair.question} <end> <assistant>")
            prompts.append(chat_prompt if chat else [1, *ids(f"Question: {pair.question}\nAnswer:")])
            answers.append(ids(text))
            count = min(last, len(answers[-1]))
            labels += [label] * count
            owners += [index] * count
    vectors = naive_vectors(model, kind, prompts, answers, last, start)
    y, train = np.array(labels), np.array([owner in train_pairs for owner in owners])
    num_heads, head_dim = MODELS[kind]
    found = {}
    for layer in range(3):
        everything = np.concatenate(vectors[layer]).astype(np.float64)
        for head in range(num_heads):
            x = everything[:, head * head_dim : (head + 1) * head_dim]
            probe = LogisticRegression(random_state=42, max_iter=1000).fit(x[train], y[train])
            right = probe.predict(x) == y
            u = sum(x[y == 1]) / sum(y == 1) - sum(x[y == 0]) / sum(y == 0)
            u /= np.sqrt((u * u).sum())
            along = x @ u
            scale = np.sqrt(((along - along.mean()) ** 2).mean())
            found[layer, head] = ((right[train].mean() + right[~train].mean()) / 2, u, scale)
    return found


@pytest.mark.parametrize("recipe", ["safetylock", "answer-start"])
@pytest.mark.parametrize("tokens", [1, 3, 5])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_against_a_naive_extraction(kind: str, chat: bool, tokens: int, recipe: str) -> None:
    model: Any = tiny_model(kind)
    train = set(np.flatnonzero(extract_module._split(len(PAIRS), 42)).tolist())
    expected = naive_rows(model, kind, chat, tokens, train, start=recipe == "answer-start")
    lock = extract(model, ChatWords() if chat else Words(), PAIRS, heads=5, tokens=tokens, recipe=recipe)
    best = sorted(sorted(expected, key=lambda row: (-expected[row][0], *row))[:5])
    assert list(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)) == best
    for row, direction, scale in zip(best, lock.directions, lock.scales, strict=True):
        np.testing.assert_allclose(direction.numpy(), expected[row][1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(float(scale), expected[row][2], rtol=1e-5)
    num_heads, head_dim = MODELS[kind]
    assert (lock.num_layers, lock.num_heads, lock.head_dim, lock.hidden_size) == (3, num_heads, head_dim, 64)
    which = {"safetylock": "last", "answer-start": "first"}[recipe]
    assert lock.recipe == f"{recipe}: {which} {tokens} answer tokens, 5 heads by logistic regression, seed 42"


@pytest.mark.parametrize("recipe", ["safetylock", "answer-start", "prompt-end"])
def test_one_ranking_gives_the_locks_of_any_number_of_heads(recipe: str) -> None:
    model, locks = tiny_model("llama"), {}
    ranking = rank_heads(model, Words(), PAIRS, 2, recipe=recipe, seed=7)
    for heads in (1, 5, 12):
        lock = locks[heads] = ranking.lock(heads)
        alone = extract(model, Words(), PAIRS, heads, 2, recipe=recipe, seed=7)
        assert (lock.digest, lock.recipe) == (alone.digest, alone.recipe)
        assert (lock.extraction_digest, lock.hidden_size) == (alone.extraction_digest, 64)
        chosen = ranking.scores[lock.layers, lock.heads]
        assert chosen.min() >= np.sort(ranking.scores, axis=None)[-heads]
    assert len(locks[12]) == 12
    for heads in (0, 13, 2.0, True):
        with pytest.raises(FastlockError, match=r"heads is .*from 1 to 12 \(the model has 3 layers of 4\)"):
            ranking.lock(heads)


def test_too_many_heads_are_refused_before_anything_is_read() -> None:
    model: Any = tiny_model("llama")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("read"))
    with pytest.raises(FastlockError, match="heads is 13"):
        extract(model, Words(), PAIRS, heads=13)


def test_a_work_directory_is_read_from_by_the_next_call(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    passes: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlock.recipes.activations.BATCH_TOKENS", 20)
        for heads in (3, 5):
            start = len(passes)
            lock = extract(model, Words(), PAIRS, heads, work=tmp_path / "work")
            assert lock.digest == extract(tiny_model("llama"), Words(), PAIRS, heads).digest
            assert (len(passes) - start == 1) == (heads == 5)  # the first batch, to see that it is the same model
        with pytest.raises(FastlockError, match="work: it was made with other texts"):
            extract(model, Words(), PAIRS[1:], 3, work=tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["activations.bin", "index.json"]


HARMLESS = ("what is this", "where do bees live", "tell me a story", "what is this", "how is bread made")


@pytest.mark.parametrize("tokens", [None, 2])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_ends_against_a_naive_extraction(kind: str, chat: bool, tokens: int | None) -> None:
    model: Any = tiny_model(kind)
    texts = [pair.question for pair in PAIRS] + list(dict.fromkeys(HARMLESS))
    prompts = [ids(f"<user> {t} <end> <assistant>") if chat else [1, *ids(f"Question: {t}\nAnswer:")] for t in texts]
    vectors = naive_vectors(model, kind, [[] for _ in prompts], prompts, tokens or 1)
    harmful = np.repeat(np.arange(len(texts)) < len(PAIRS), tokens or 1)
    num_heads, head_dim = MODELS[kind]
    expected = {}
    for layer in range(3):
        everything = np.concatenate(vectors[layer]).astype(np.float64)
        for head in range(num_heads):
            x = everything[:, head * head_dim : (head + 1) * head_dim]
            u = x[harmful].mean(axis=0) - x[~harmful].mean(axis=0)
            u /= np.linalg.norm(u)
            a, b = x[harmful] @ u, x[~harmful] @ u
            cohens_d = (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)
            expected[layer, head] = (cohens_d, u, np.concatenate([a, b]).std())
    tokenizer = ChatWords() if chat else Words()
    lock = extract(model, tokenizer, PAIRS, 5, tokens, recipe="prompt-end", harmless=HARMLESS)
    best = sorted(sorted(expected, key=lambda row: -expected[row][0])[:5])
    assert list(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)) == best
    for row, direction, scale in zip(best, lock.directions, lock.scales, strict=True):
        np.testing.assert_allclose(direction.numpy(), expected[row][1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(float(scale), expected[row][2], rtol=1e-5)
    assert lock.recipe == f"prompt-end: last {tokens or 1} prompt tokens, 5 heads by effect size"
    other = extract(model, tokenizer, PAIRS, 5, tokens, recipe="prompt-end", harmless=HARMLESS[1:])
    assert other.extraction_digest != lock.extraction_digest


def test_a_head_that_is_the_same_for_all_prompts_has_no_effect() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        for layer in range(3):
            model.model.layers[layer].self_attn.v_proj.weight[:32].zero_()  # of heads 0 and 1
    lock = extract(model, Words(), PAIRS, 6, recipe="prompt-end", harmless=HARMLESS)
    assert lock.heads.tolist() == [2, 3] * 3
    with pytest.raises(FastlockError, match="has no direction"):
        extract(model, Words(), PAIRS, 7, recipe="prompt-end", harmless=HARMLESS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "other"}, "there is no recipe 'other'. Choose one of safetylock, answer-start, prompt-end"),
        ({"harmless": ["a", "b"]}, "the recipe safetylock reads no harmless prompts"),
        ({"recipe": "prompt-end", "harmless": "text"}, "harmless is of type str"),
        ({"recipe": "prompt-end", "harmless": 3}, "harmless is of type int"),
        ({"recipe": "prompt-end", "harmless": ["a", "a"]}, "at least two different prompts"),
        ({"recipe": "prompt-end", "harmless": ["a", " "]}, "none of them empty"),
        ({"recipe": "prompt-end", "harmless": ["a", "b " * 70]}, "harmless prompt 2: it makes 7. tokens"),
    ],
)
def test_recipes_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FastlockError, match=message):
        extract(tiny_model("llama"), Words(), PAIRS, 4, **options)


def test_another_recipe_is_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts, its number of tokens, its scoring and its name in a lock are its own."""

    def texts(model: Any, tokenizer: Any, pairs: Any, harmless: Any, tokens: int) -> list[LabelledText]:
        assert harmless == ()
        questions = [Words()(pair.question)["input_ids"] for pair in pairs]
        return [LabelledText(ids, tokens, f"q {n}", n, safe=n < 3) for n, ids in enumerate(questions)]

    mine = Recipe("mine", "last {} question tokens", tokens=2, searched=(1,), texts=texts, scoring=EFFECT_SIZE)
    monkeypatch.setitem(RECIPES, "mine", mine)
    ranking = rank_heads(tiny_model("llama"), Words(), PAIRS, recipe="mine")
    assert ranking.lock(3).recipe == "mine: last 2 question tokens, 3 heads by effect size"
    scores = np.array(ranking.scores)

    def scored(x: torch.Tensor, along: torch.Tensor, safe: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
        assert (x.shape[1], int(safe.sum()), int(train.sum())) == (12, 6, 6)  # 60 % of 6, rounded down, train
        return EFFECT_SIZE.scores(x, along, safe, train) + 1

    split = dataclasses.replace(mine, scoring=Scoring("a spy", splits=True, scores=scored))
    monkeypatch.setitem(RECIPES, "mine", split)
    ranking = rank_heads(tiny_model("llama"), Words(), PAIRS, recipe="mine", seed=3)
    np.testing.assert_allclose(ranking.scores, scores + 1)
    assert ranking.lock(3).recipe == "mine: last 2 question tokens, 3 heads by a spy, seed 3"
    with pytest.raises(FastlockError, match="the recipe mine reads no harmless prompts.*, or choose prompt-end"):
        rank_heads(tiny_model("llama"), Words(), PAIRS, recipe="mine", harmless=["a", "b"])


def test_a_planted_head_is_found_with_its_direction_and_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything is noise except layer 1, head 2, which is shifted by +u for safe answers and by -u for unsafe ones."""
    model, u = tiny_model("llama"), np.zeros(32)
    u[[3, 7]] = 0.6, -0.8

    @contextlib.contextmanager
    def planted(_model: Any, _sites: Any, texts: Any, _progress: Any, _work: Any) -> Iterator[Activations]:
        lengths = [len(text.ids) for text in texts]
        assert lengths == sorted(lengths)
        noise = np.random.RandomState(0).standard_normal((3, 4, sum(text.kept for text in texts), 32))
        signs = np.repeat([1.0 if text.safe else -1.0 for text in texts], [text.kept for text in texts])
        noise[1, 2] = 0.01 * noise[1, 2] + 3 * signs[:, None] * u
        noise.astype(np.float32).tofile(tmp_path / "planted")
        yield Activations(tmp_path / "planted", noise.shape)

    monkeypatch.setattr(extract_module, "activations_of", planted)
    lock = extract(model, Words(), PAIRS, heads=1)
    assert (lock.layers.tolist(), lock.heads.tolist()) == ([1], [2])
    assert float(lock.directions[0].double() @ torch.from_numpy(u)) > 0.999
    assert float(lock.scales[0]) == pytest.approx(3, rel=0.05)


def test_the_split_is_by_pair_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"question {i}", f"no {i} is for others", f"yes {i} is for me") for i in range(10)]
    seen = []

    def spy(activations: Any, safe: Any, train: Any, *others: Any) -> Any:
        seen.append((safe, train))
        return statistics(activations, safe, train, *others)

    monkeypatch.setattr(extract_module, "statistics", spy)
    extract(tiny_model("llama"), Words(), pairs, heads=1)
    safe, train = seen[0]
    # 10 vectors a pair: 5 safe, then 5 unsafe, all on one side.
    assert safe.reshape(10, 2, 5).all(axis=2).tolist() == [[True, False]] * 10
    assert (train.reshape(10, 10).all(axis=1) | (~train).reshape(10, 10).all(axis=1)).all()
    assert train.reshape(10, 10)[:, 0].sum() == 6
    extract(tiny_model("llama"), Words(), pairs, heads=1, seed=43)
    assert (seen[-1][1] != train).any()
    for count in range(2, 40):
        assert 1 <= extract_module._split(count, 0).sum() == int(count * 6 / 10 + 1e-9) < count


def test_equal_scores_go_to_the_lower_layer_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlock.recipes.head_scores.accuracies", lambda x, *_: torch.full(x.shape[:1], 0.5))
    lock = extract(tiny_model("llama"), Words(), PAIRS, heads=6)
    assert lock.layers.tolist() == [0, 0, 0, 0, 1, 1]
    assert lock.heads.tolist() == [0, 1, 2, 3, 0, 1]


def test_the_same_inputs_give_the_same_lock_and_the_same_bytes(tmp_path: Path) -> None:
    locks = [extract(tiny_model("llama"), Words(), PAIRS, heads=4) for _ in range(2)]
    for number, lock in enumerate(locks):
        lock.save(tmp_path / f"{number}.safetensors")
    assert locks[0].digest == locks[1].digest
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_provenance(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    lock = extract(model, Words(), PAIRS, heads=2, tokens=3, seed=7)
    assert lock.recipe == "safetylock: last 3 answer tokens, 2 heads by logistic regression, seed 7"
    assert lock.fastlock_version == fastlock.__version__
    assert lock.base_model is None
    triples = json.dumps([[p.question, p.safe, p.unsafe] for p in PAIRS], separators=(",", ":"))
    assert lock.extraction_digest == hashlib.sha256(triples.encode()).hexdigest()
    model.config._name_or_path = "someone/aligned"
    assert extract(model, Words(), PAIRS, heads=1).base_model == "someone/aligned"
    assert extract(model, Words(), PAIRS[::-1], heads=1).extraction_digest != lock.extraction_digest
    model.config._name_or_path = str(tmp_path / "aligned")
    (tmp_path / "aligned").mkdir()
    assert extract(model, Words(), PAIRS, heads=1).base_model == "aligned"


def test_the_model_is_left_as_it_was_and_the_lock_fits_it() -> None:
    model: Any = tiny_model("llama", attention_dropout=0.5)
    expected = extract(model, Words(), PAIRS, heads=3)
    before = state(model)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    lock = extract(model, Words(), PAIRS, heads=3)  # dropout is off while it reads
    assert [module.training for module in model.modules()] == modes
    assert same_state(state(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert lock.digest == expected.digest
    fastlock.relock(model, lock, 6.0)


def test_the_model_is_left_as_it_was_by_an_error() -> None:
    model: Any = tiny_model("llama").train()
    model.model.layers[2].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FastlockError, match=r"model\.layers\.2\.self_attn\.o_proj: NaN.*pair 1"):
        extract(model, Words(), PAIRS, heads=1)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    exact = extract(tiny_model("llama"), Words(), PAIRS, heads=12)
    lock = extract(tiny_model("llama", dtype), Words(), PAIRS, heads=12)
    cosines = (lock.directions * exact.directions).sum(dim=1)
    assert cosines.min() > (0.99999 if dtype == torch.float64 else 0.9)


def test_a_compiled_model_and_progress() -> None:
    model: Any = tiny_model("llama")
    loops: list[str] = []

    def progress(items: Any, description: str) -> Any:
        for item in items:
            loops.append(description)
            yield item

    compiled: Any = torch.compile(model)
    lock = extract(compiled, Words(), PAIRS, heads=3, progress=progress)
    assert lock.digest == extract(model, Words(), PAIRS, heads=3).digest
    assert loops == ["Reading answers"] + ["Scoring heads"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, "there are no pairs"),
        ({"pairs": PAIRS[:1]}, "only one pair"),
        ({"pairs": PAIRS[:1] * 2}, "only one pair"),
        ({"pairs": "pairs.jsonl"}, r"pairs is of type str; read a file with fastlock.load_pairs"),
        ({"pairs": None}, "pairs is of type NoneType"),
        ({"pairs": {"train": PAIRS, "test": PAIRS}}, "pairs is a dict of train, test. Give a list"),
        ({"pairs": [PAIRS[0], {"question": "q"}]}, "pair 2: a pair has the keys"),
        ({"heads": 0}, "heads is 0.*from 1 to 12"),
        ({"heads": 13}, r"heads is 13.*the model has 3 layers of 4"),
        ({"heads": True}, "heads is True"),
        ({"heads": 2.0}, "heads is 2.0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"tokenizer": Words(vocabulary=10_000)}, "pair 1: the tokenizer gives token"),
        (
            {"pairs": [*PAIRS, Pair("long " * 70, "no", "yes")]},
            "pair 7: it makes 7. tokens.* at most 64",
        ),
        ({"pairs": [*PAIRS, Pair("q", "\u200b\u200b", "yes")], "tokenizer": None}, "pair 7: .*no token"),
        ({"model": torch.nn.Linear(2, 2)}, "not a transformers model"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    class Blank(Words):
        """Makes nothing of a zero-width space, as some tokenizers do."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return super().__call__(text.replace("\u200b", ""), add_special_tokens)

    arguments: dict[str, Any] = {
        "model": tiny_model("llama"),
        "tokenizer": Words(),
        "pairs": PAIRS,
        "heads": 2,
    } | changes
    arguments["tokenizer"] = arguments["tokenizer"] or Blank()
    with pytest.raises(FastlockError, match=message):
        extract(**arguments)


def test_a_relocked_model_is_refused_until_it_is_unlocked(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    expected = extract(model, Words(), PAIRS, heads=3).digest
    fastlock.relock(model, random_lock(model))
    with pytest.raises(FastlockError, match="is relocked"):
        extract(model, Words(), PAIRS, heads=3)
    fastlock.unlock(model)
    assert extract(model, Words(), PAIRS, heads=3).digest == expected


def test_layers_that_share_a_projection_are_refused() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    with pytest.raises(fastlock.UnsupportedError, match="share one output projection"):
        extract(model, Words(), PAIRS, heads=3)


def test_a_head_without_a_direction_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    with pytest.raises(FastlockError, match="layer 1, head 0: its mean output is the same"):
        extract(model, Words(), PAIRS, heads=12)
    ranking = rank_heads(model, Words(), PAIRS)
    assert (ranking.scores[1] == 0).all()
    assert (ranking.scores[[0, 2]] > 0).all()
    assert ranking.lock(8).layers.tolist() == [0] * 4 + [2] * 4
