"""Extraction, against a naive one: hooks on the decoder's own layers, and NumPy in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import fastlock
from fastlock import FastlockError
from fastlock.evaluation.prompts import shipped_prompts
from fastlock.inference.chat import prompt_tokens
from fastlock.recipes.activations import Activations
from fastlock.recipes.extraction import extract, rank_heads
from fastlock.recipes.head_scores import EFFECT_SIZE, Scoring, statistics
from fastlock.recipes.pairs import Pair, load_pairs, shipped_harmless, shipped_pairs
from fastlock.recipes.recipe import LabelledText, Recipe
from fastlock.recipes.recipe_table import RECIPES
from tests.helpers.families import random_lock, same_state, state, tiny_model, word_tokenizer

extract_module = importlib.import_module(
    "fastlock.recipes.extraction"
)  # the attribute fastlock.extract is the function

PAIRS = [
    Pair("may I", "sorry I can not", "sure here it is"),
    Pair("can you", "that would be wrong so no", "yes of course I will do that now"),
    Pair("tell me", "no I will not tell", "gladly here you go"),
    Pair("how do I", "please do not do this at all", "first you go there and then"),
    Pair("help me", "I can not be of help", "I can be of help"),
    Pair("show it", "that is private I am afraid", "look over here then you see"),
]
PATHS = {"llama": "model.layers.{}.self_attn.o_proj", "gpt2": "transformer.h.{}.attn.c_proj"}
MODELS = {"llama": (4, 32), "gpt2": (4, 16)}  # num_heads, head_dim
AUTHORS_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


class Words:
    """A tokenizer that hashes words; its special token is 1."""

    chat_template: str | None = None

    def __init__(self, vocabulary: int = 119) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + int(hashlib.md5(word.encode()).hexdigest(), 16) % (self.vocabulary - 3) for word in text.split()]
        return {"input_ids": [1] * add_special_tokens + ids}


class ChatWords(Words):
    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, **options: Any) -> str:
        assert not tokenize
        assert options == {"add_generation_prompt": len(messages) == 1, "date_string": "26 Jul 2024"} or messages[1:]
        return " ".join(f"<{m['role']}> {m['content']} <end>" for m in messages) + " <assistant>"


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


def test_the_shipped_harmless_prompts_are_not_those_that_are_evaluated() -> None:
    harmless, asked = shipped_harmless(), shipped_prompts()
    assert len(set(harmless)) == len(harmless) == 100
    assert not {text.lower() for text in harmless} & {text.lower() for text in (*asked.harmful, *asked.harmless)}
    assert not {pair.question.lower() for pair in shipped_pairs()} & {text.lower() for text in asked.harmful}


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


def test_dictionaries_are_pairs_too() -> None:
    model = tiny_model("llama")
    ours = [{"question": p.question, "safe": p.safe, "unsafe": p.unsafe} for p in PAIRS]
    theirs = [
        {"question": p.question, "answer_matching_behavior": p.safe, "answer_not_matching_behavior": p.unsafe}
        for p in PAIRS
    ]
    assert extract(model, Words(), ours, heads=2) == extract(model, Words(), theirs, heads=2)
    assert extract(model, Words(), ours, heads=2) == extract(model, Words(), PAIRS, heads=2)


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


def real_tokenizer(template: str) -> Any:
    words = word_tokenizer(PAIRS)
    words.chat_template = template
    return words


def test_a_lock_does_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ date_string }} {{ messages[0]['content'] }}"
    )
    digests = set()
    for day in (24, 25):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, *_: Any, day: int = day) -> Any:
                return datetime.datetime(2026, 11, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        words = real_tokenizer(template)
        assert str(day) in words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        digests.add(prompt_tokens(words, "x y")[0][0])
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("between", "space"),
    [(" ", " "), ("", ""), ("{{ '\\n\\n' }}", "\n\n"), ("<think></think>", ""), ("{{ raise() }}", "")],
)
def test_what_a_template_puts_before_an_answer(between: str, space: str) -> None:
    """Its words are tokenized as the model reads them; what is no space is for the model to say."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }} bot:{% else %}"
        + between
        + "{{ m['content'] }} end{% endif %}{% endfor %}"
    )
    assert prompt_tokens(real_tokenizer(template), "answer me")[1] == space


def test_a_prompt_does_not_end_in_the_end_of_all_text() -> None:
    class Ending(Words):
        eos_token_id = 2

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": super().__call__(text, add_special_tokens)["input_ids"] + [2] * add_special_tokens}

    assert prompt_tokens(Ending(), "may I") == prompt_tokens(Words(), "may I")


def test_a_pair_given_twice_counts_once() -> None:
    once, twice = (extract(tiny_model("llama"), Words(), pairs, heads=3) for pairs in (PAIRS, PAIRS + PAIRS[:2]))
    assert once.digest == twice.digest
    assert once.extraction_digest == twice.extraction_digest


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def lines(keys: tuple[str, ...] = ("question", "safe", "unsafe")) -> list[str]:
    return [json.dumps(dict(zip(keys, (p.question, p.safe, p.unsafe), strict=True))) for p in PAIRS]


@pytest.mark.parametrize("keys", [("question", "safe", "unsafe"), AUTHORS_KEYS])
def test_every_layout_gives_the_same_pairs(tmp_path: Path, keys: tuple[str, ...]) -> None:
    entries = [json.loads(line) | {"id": 1} for line in lines(keys)]
    for text in (
        "\n".join(lines(keys)),
        "\ufeff" + "\r\n\r\n".join(lines(keys)) + "\r\n",
        " \n" + json.dumps(entries, indent=4),
    ):
        assert load_pairs(write(tmp_path / "pairs", text)) == tuple(PAIRS)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content, "name": ""}


def layouts(pair: Pair) -> dict[str, dict[str, Any]]:
    """The pair in every layout, texts and messages."""
    question, safe, unsafe = pair.question, pair.safe, pair.unsafe
    asked, good, bad = [message("user", question)], [message("assistant", safe)], [message("assistant", unsafe)]
    return {
        "texts": {"question": question, "safe": safe, "unsafe": unsafe},
        "authors": dict(zip(AUTHORS_KEYS, (question, safe, unsafe), strict=True)),
        "messages": {"question": asked, "safe": good, "unsafe": bad},
        "a message and texts": {"question": asked, "safe": safe, "unsafe": unsafe},
        "preferences": {"prompt": question, "chosen": safe, "rejected": unsafe},
        "preferences in messages": {"prompt": asked, "chosen": good, "rejected": bad},
        "conversations": {"prompt": question, "chosen": asked + good, "rejected": asked + bad, "score": 1.0},
        "implicit prompt": {"chosen": asked + good, "rejected": asked + bad},
    }


class Dataset:
    """What `datasets.Dataset` is to one who loops over it: rows, as often as one likes."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.parametrize("layout", layouts(PAIRS[0]))
def test_every_layout_and_any_iterable_give_the_same_pairs(tmp_path: Path, layout: str) -> None:
    rows = [layouts(pair)[layout] for pair in PAIRS]
    assert load_pairs(write(tmp_path / "pairs", "\n".join(map(json.dumps, rows)))) == tuple(PAIRS)
    expected = extract(tiny_model("llama"), Words(), PAIRS, heads=3)
    for given in (Dataset(rows), (types.MappingProxyType(row) for row in rows)):
        lock = extract(tiny_model("llama"), Words(), given, heads=3)
        assert (lock.digest, lock.extraction_digest) == (expected.digest, expected.extraction_digest)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"prompt": []}, "`prompt` holds the messages ''"),
        (
            {"prompt": [message("system", "be good"), message("user", "q")]},
            "`prompt` holds the messages 'system, user'",
        ),
        ({"prompt": [message("assistant", "q")]}, "it must be one message, of the user"),
        (
            {"chosen": [message("user", "no")]},
            "`chosen` holds the messages 'user'; it must be one message, of the assistant",
        ),
        ({"chosen": [message("user", "other"), message("assistant", "no")]}, "`chosen` holds the messages 'user, assi"),
        ({"rejected": [message("assistant", "a")] * 2}, "`rejected` holds the messages 'assistant, assistant'"),
        ({"rejected": ["yes"]}, "`rejected` is a list, but not of messages"),
        ({"rejected": [{"role": "assistant"}]}, "`rejected` is a list, but not of messages"),
        ({"rejected": [{"role": "assistant", "content": [{"type": "text"}]}]}, "`rejected`: its message holds a list"),
        ({"rejected": [message("assistant", " ")]}, "`unsafe` is empty"),
        ({"chosen": "", "prompt": "q"}, "`safe` is empty"),
        ({"chosen": [message("assistant", "yes")], "rejected": "yes"}, "the safe and the unsafe answer to 'q' are the"),
        ({"prompt": None, "chosen": "a"}, "`question` is of type NoneType"),
    ],
)
def test_conversations_that_are_no_pair_are_refused(changes: dict[str, Any], found: str) -> None:
    entry = {"prompt": "q", "chosen": "no", "rejected": "yes"} | changes
    with pytest.raises(FastlockError, match=f"pair 2: .*{found}"):
        extract(tiny_model("llama"), Words(), [PAIRS[0], entry], heads=3)


@pytest.mark.parametrize(
    "entry",
    [
        {"chosen": [], "rejected": []},
        {"chosen": [message("user", "q"), message("assistant", "a")], "rejected": [message("assistant", "b")] * 2},
        {"chosen": [message("user", "q"), message("assistant", "a")], "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
    ],
)
def test_preferences_without_a_prompt_need_the_same_question(entry: dict[str, Any]) -> None:
    with pytest.raises(FastlockError, match="pair 1: .*(holds the messages|a pair has the keys)"):
        extract(tiny_model("llama"), Words(), [entry, PAIRS[0]], heads=3)


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    line = json.dumps({"question": "one\u2028two", "safe": "no", "unsafe": "yes"}, ensure_ascii=False)
    assert load_pairs(write(tmp_path / "pairs", line))[0].question == "one\u2028two"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no pairs"),
        ("[]", "no pairs"),
        ("{}", r"line 1: a pair has the keys question, safe, unsafe, or .*; this one has none"),
        (lines()[0] + '\n\n{"question": "q", "safe": "s"}', "line 3: a pair has the keys"),
        (lines()[0] + "\nquestion,safe", "line 2: not JSON"),
        ("[" + lines()[0] + ', {"question": 1}]', "entry 2: a pair has the keys"),
        ("[" + lines()[0] + ", 7]", "entry 2: it is of type int"),
        ("[1, 2", "not JSON"),
        ("7", "line 1: it is of type int"),
        ('{"question": ["q"], "safe": "s", "unsafe": "u"}', "line 1: `question` is a list"),
        ('{"question": "q", "safe": " ", "unsafe": "u"}', "line 1: `safe` is empty"),
        ('{"question": "", "safe": "s", "unsafe": "u"}', "line 1: `question` is empty"),
        ('{"question": "q", "safe": "s", "unsafe": null}', "line 1: `unsafe` is of type NoneType"),
        (
            '{"question": "q", "safe": "s", "unsafe": "s "}',
            "line 1: the safe and the unsafe answer to 'q' are the same",
        ),
        ('{"question": "q", "safe": "s", "unsafe": "\\ud800"}', "line 1: `unsafe` holds half a character"),
        ("[" * 200_000, "not JSON"),
        ('{"a":' * 200_000, "line 1: not JSON"),
        ("9" * 10_000, "line 1: not JSON"),
    ],
)
def test_bad_files_are_refused_by_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(fastlock.DamagedError, match=message):
        load_pairs(write(tmp_path / "pairs", text))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastlockError, match="does not exist"):
        load_pairs(tmp_path / "nothing")
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(fastlock.DamagedError, match="UTF-8"):
        load_pairs(tmp_path / "latin")
    monkeypatch.setattr("fastlock.recipes.pairs.MAX_FILE_BYTES", 8)
    with pytest.raises(FastlockError, match="larger than"):
        load_pairs(tmp_path / "latin")


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


def test_the_shipped_pairs() -> None:
    pairs = shipped_pairs()
    assert len(set(pairs)) == len(pairs) == 100
    for texts in ([p.question for p in pairs], [p.safe for p in pairs], [p.unsafe for p in pairs]):
        assert len(set(texts)) == 100
    # At least five words, so at least five tokens; and short, so that extraction is quick.
    assert all(5 <= len(text.split()) <= 25 for pair in pairs for text in (pair.safe, pair.unsafe))
