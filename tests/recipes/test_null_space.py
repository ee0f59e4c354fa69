"""The recipe "null-space", against the ridge regression that it solves: in NumPy, over every vector, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastlock
from fastlock import FastlockError
from fastlock.evaluation.evaluator import Answer
from fastlock.inference.batching import no_progress
from fastlock.models.sites import sites
from fastlock.recipes import null_space
from fastlock.recipes.gate_solution import RIDGE, solved
from fastlock.recipes.harm_probe import HarmProbe
from fastlock.recipes.second_moments import GroupedText, moments_of
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.helpers.words import PAIRS, ChatWords, Words

HARMLESS = ("what is this", "where do bees live", "tell me a story of ten bees", "how is bread made")
SCARY = ("kill the lights", "shoot a film")
TEXTS = ("once upon a time there was a bee", "bread is made of flour and water")
LAYERS = (0, 2)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the base says: a tiny model would answer at random."""
    monkeypatch.setattr(null_space, "evaluate", lambda _m, _t, prompts, **_: said(prompts, lambda n: n == 1))


def said(prompts: Any, refused: Any) -> Any:
    """An evaluation in which the base says "well" to a request, as often as its number, and refuses some."""
    assert not prompts.harmful
    told = [Answer(prompt, "well " * n, refused(n)) for n, prompt in enumerate(prompts.harmless)]
    return (type("Said", (), {"harmless": told})(),)


def made(model: Any, tokenizer: Any = None, **options: Any) -> fastlock.Lock:
    """A lock of the material above."""
    given = {"harmless": HARMLESS, "scary": SCARY, "texts": TEXTS, "layers": LAYERS} | options
    return fastlock.extract(model, tokenizer or Words(), given.pop("pairs", PAIRS), recipe="null-space", **given)


def inputs(model: Any, ids: list[int]) -> list[np.ndarray]:
    """What enters each layer's output projection at every token, [tokens, width] float64."""
    seen: list[Any] = [None] * 3
    hooks = [
        model.model.layers[layer].self_attn.o_proj.register_forward_hook(
            lambda _m, args, _out, layer=layer: seen.__setitem__(layer, args[0][0].double().numpy())
        )
        for layer in range(3)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def ids(text: str) -> list[int]:
    return Words()(text, add_special_tokens=False)["input_ids"]


def vectors(model: Any, layer: int, tokens: int, rank: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """x of each harmful group, of each benign one, [vectors, width], and what should be added in each harmful one."""
    harmful: list[list[Any]] = [[] for _ in range(1 + 2 * tokens)]  # ends, tokens of safe answers, of unsafe ones
    benign: list[list[Any]] = [[], [], []]  # ends, the other tokens of requests and answers, texts
    for pair in PAIRS:
        prompt = [1, *ids(f"Question: {pair.question}\nAnswer:")]
        for kind, answer in enumerate((pair.safe, pair.unsafe)):
            words = ids(answer)[:tokens]
            x = inputs(model, prompt + words)[layer][len(prompt) - 1 :]
            for group, vector in zip([0, *range(1 + kind * tokens, 1 + kind * tokens + len(words))], x, strict=True):
                harmful[group].append(vector)
    for n, question in enumerate((*HARMLESS, *SCARY)):
        if n != 1:  # the base refuses this one
            prompt = [1, *ids(f"Question: {question}\nAnswer:")]
            x = inputs(model, prompt + ids("well " * n))[layer]
            benign[0].append(x[len(prompt) - 1])
            benign[1] += [vector for position, vector in enumerate(x) if position != len(prompt) - 1]
    for text in TEXTS:
        benign[2] += list(inputs(model, [1, *ids(text)])[layer])
    means = [np.mean(group, axis=0) for group in harmful]
    added = [means[0] - np.mean(benign[0], axis=0)] * (1 + 2 * tokens)
    if rank > 1:
        added[1:] = [means[1 + t % tokens] - means[1 + tokens + t % tokens] for t in range(2 * tokens)]
    return [np.array(group) for group in harmful], [np.array(group) for group in benign], np.array(added)


def least_squares(
    harmful: list[np.ndarray], benign: list[np.ndarray], added: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The map of full rank, by numpy.linalg.lstsq over all vectors, each with its weight; and each group's weight."""
    weights = [0.5, *[0.25 / tokens] * (2 * tokens)]
    rows, targets = [], []
    for group, weight, target in zip(harmful, weights, added, strict=True):
        rows.append(group * np.sqrt(weight / len(group)))
        targets.append(np.tile(target, (len(group), 1)) * np.sqrt(weight / len(group)))
    rows += [group * np.sqrt(null_space.BENIGN / 3 / len(group)) for group in benign]
    trace = sum((block * block).sum() for block in rows)
    width = added.shape[1]
    rows.append(np.eye(width) * np.sqrt(RIDGE * trace / width))
    x = np.concatenate(rows)
    y = np.concatenate([*targets, np.zeros((len(x) - sum(map(len, targets)), width))])
    return np.linalg.lstsq(x, y, rcond=None)[0].T, np.array(weights)


def dense(lock: fastlock.Lock, layer: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(part.numpy() for part in lock.gates(1.0)[layer].dense(128))  # type: ignore[return-value]


@pytest.mark.parametrize(("tokens", "rank"), [(1, 2), (2, 1)])
def test_the_gate_is_the_ridge_regression_of_that_rank(tokens: int, rank: int) -> None:
    model: Any = tiny_model("llama")
    lock = made(model, tokens=tokens, rank=rank)
    assert (lock.rank, lock.has_constant, lock.layers.unique().tolist()) == (rank, False, list(LAYERS))
    for layer in LAYERS:
        harmful, benign, added = vectors(model, layer, tokens, rank)
        whole, weights = least_squares(harmful, benign, added, tokens)
        second = sum(w * group.T @ group / len(group) for w, group in zip(weights, harmful, strict=True))
        second = second + sum(null_space.BENIGN / 3 * group.T @ group / len(group) for group in benign)
        second += RIDGE * np.trace(second) / len(second) * np.eye(len(second))
        root = np.linalg.cholesky(second)
        u, s, vt = np.linalg.svd(whole @ root)  # the nearest of this rank in the norm of what was read
        nearest = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
        means = np.array([group.mean(axis=0) for group in harmful])
        says = means @ nearest.T
        nearest *= (weights[:, None] * added * added).sum() / (weights[:, None] * says * added).sum()
        readers, writers = dense(lock, layer)
        np.testing.assert_allclose(writers @ readers.T, nearest, rtol=0, atol=2e-4 * np.abs(nearest).max())
        read = means @ readers
        np.testing.assert_allclose(np.take_along_axis(read, np.abs(read).argmax(0)[None], 0), 1, rtol=1e-4)


def test_what_is_benign_is_not_read_and_what_is_harmful_reads_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both can be told apart exactly: benign vectors in a subspace, harmful ones with a part outside."""
    monkeypatch.setattr("fastlock.recipes.gate_solution.RIDGE", 1e-9)
    random = np.random.default_rng(0)
    benign = random.standard_normal((200, 20)) @ random.standard_normal((20, 32))
    outside = np.linalg.svd(benign)[2][20:]
    harmful = benign[:50] + 3 * outside[0]
    target = random.standard_normal((1, 32))
    means = harmful.mean(0, keepdims=True)
    for weight, most in ((1e2, 0.05), (1e4, 5e-4)):
        second = harmful.T @ harmful / 50 + weight * benign.T @ benign / 200
        given = [torch.from_numpy(part) for part in (second, means, np.ones(1), target)]
        readers, writers = (part.numpy() for part in solved(*given, 1, "layer"))
        assert np.abs(benign @ readers).max() < most
        np.testing.assert_allclose(harmful @ readers, 1, atol=most)
        np.testing.assert_allclose((harmful @ readers @ writers.T).mean(0, keepdims=True), target, atol=1e-9)


def test_moments_are_streamed_layer_by_layer_and_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    texts = [
        GroupedText(rows[0], 2, "a", (0, 1)),
        GroupedText(rows[1], 2, "b", (1, 1)),
        GroupedText(rows[2], 3, "c", (2, 0, 0)),
    ]
    weights = (2.0, 0.5, 0.0)
    passes: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr("fastlock.recipes.activations.BATCH_TOKENS", 5)
    monkeypatch.setattr("fastlock.recipes.second_moments.GROUP_BYTES", 1)
    found = dict(moments_of(model, sites(model), (0, 2), texts, weights, no_progress))
    assert len(passes) == 2 * 3
    assert list(found) == [0, 2]
    read = [inputs(model, row) for row in rows]
    for layer, moments in found.items():
        a, b, c = (x[layer] for x in read)
        groups = [np.array([a[2], c[4], c[5]]), np.array([a[3], b[0], b[1]]), c[3:4]]
        np.testing.assert_allclose(moments.means.numpy(), [g.mean(0) for g in groups], rtol=0, atol=1e-6)
        second = sum(w * g.T @ g / len(g) for w, g in zip(weights, groups, strict=True))
        np.testing.assert_allclose(moments.second.numpy(), second, rtol=0, atol=1e-6)


def test_the_lock_says_where_it_comes_from_and_the_model_is_left_as_it_was() -> None:
    model: Any = tiny_model("llama")
    before = state(model)
    lock = made(model)
    assert made(model).digest == lock.digest
    assert same_state(state(model), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert (lock.num_layers, lock.num_heads, lock.head_dim, lock.hidden_size) == (3, 4, 32, 64)
    assert lock.recipe == "null-space: rank 1 gate, prompts' ends and first 3 answer tokens"
    assert lock.extraction_digest == fastlock.recipes.pairs.pairs_digest(PAIRS, (*HARMLESS, *SCARY, *TEXTS))
    assert made(model, ChatWords()).digest != lock.digest
    assert made(model, scary=()).digest != lock.digest
    norms = model.model.layers[2].self_attn.o_proj.weight.detach().norm(dim=0).view(4, 32)
    torch.testing.assert_close(lock.column_norms[4:], norms)  # type: ignore[index]


def test_layers_are_those_that_tell_both_kinds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(null_space, "read_probe", lambda *given: asked.append(given[2:4]) or HarmProbe(None, None))  # type: ignore[arg-type]
    monkeypatch.setattr(HarmProbe, "layers", lambda self: (1, 2))
    assert made(tiny_model("llama"), layers=None).layers.unique().tolist() == [1, 2]
    assert asked == [([pair.question for pair in PAIRS], HARMLESS)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be an integer from 1 to 4 with 3 tokens of each answer"),
        ({"tokens": 1, "rank": 3}, "rank is 3; it must be an integer from 1 to 2"),
        ({"tokens": 0}, "tokens is 0"),
        ({"layers": ()}, "layers: there are none"),
        ({"layers": (0, 3)}, "layers: one of them is 3.*from 0 to 2"),
        ({"heads": 4}, "heads: the recipe null-space makes a gate, which reads all heads"),
        ({"work": "somewhere"}, "work: the recipe null-space"),
        ({"harmless": ["a"]}, "harmless: give at least two different prompts"),
        ({"scary": [" "]}, "scary: give texts, none of them empty"),
        ({"texts": []}, "texts: give at least one text"),
        ({"texts": "a text"}, "texts is of type str; give a list of texts"),
        ({"pairs": PAIRS[:1]}, "there is only one pair"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    model: Any = tiny_model("llama")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("read"))
    with pytest.raises(FastlockError, match=message):
        made(model, **options)


def test_a_relocked_base_and_one_that_refuses_everything_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    monkeypatch.setattr(null_space, "evaluate", lambda _m, _t, prompts, **_: said(prompts, lambda _n: True))
    with pytest.raises(FastlockError, match="the base refuses all of the harmless requests"):
        made(model)
    fastlock.relock(model, random_lock(model))
    with pytest.raises(FastlockError, match="a lock comes from the base without one"):
        made(model)


def test_pairs_that_end_alike_and_silent_heads_are_refused() -> None:
    model: Any = tiny_model("llama")
    alike = [fastlock.Pair(pair.question, "no " + pair.safe, "no " + pair.unsafe) for pair in PAIRS]
    with pytest.raises(FastlockError, match=r"o_proj: rank is 2, but the pairs give fewer directions"):
        made(model, pairs=alike, tokens=1, rank=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    with pytest.raises(FastlockError, match=r"layers\.0\.self_attn\.o_proj: its heads say nothing"):
        made(model)


@pytest.mark.parametrize("option", ["rank", "layers", "scary", "texts"])
def test_other_recipes_refuse_what_only_a_gate_has(option: str) -> None:
    given: dict[str, Any] = {option: 1 if option == "rank" else ["a", "b"]}
    with pytest.raises(FastlockError, match=f"{option}: the recipe prompt-end makes a lock without a gate; null-space"):
        fastlock.extract(tiny_model("llama"), Words(), PAIRS, recipe="prompt-end", **given)
    with pytest.raises(FastlockError, match="the recipe null-space ranks no heads"):
        fastlock.rank_heads(tiny_model("llama"), Words(), PAIRS, recipe="null-space")
