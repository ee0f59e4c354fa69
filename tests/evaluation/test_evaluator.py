"""Refusals, over-refusals and perplexity, against what the unfolded model does one prompt and one token at a time."""

from __future__ import annotations

import importlib
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastlock
from fastlock.evaluation.evaluator import Answer, Evaluation, evaluate, interval
from fastlock.evaluation.prompts import Prompts
from fastlock.evaluation.report import report_html, report_markdown
from fastlock.models.unfolded import unfolded
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.helpers.reading import Numbers, exact_model, naive_answer, naive_perplexity

evaluate_module = importlib.import_module("fastlock.evaluation.evaluator")

PROMPTS = Prompts(
    harmful=("5 6 7", "8 9 10 11 12", "13", "14 15"),
    harmless=("16 17 18 19 20 21 22", "23 24"),
    texts=("30 31 32 33 34", "35 36 37 38 39 40 41 42 43"),
)


def odd(_prompt: str, answer: str) -> bool:
    return sum(map(int, answer.split())) % 2 == 1


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_as_it_is_and_relocked(kind: str, chat: bool, batch_size: int) -> None:
    model = exact_model(kind)
    lock, before = random_lock(model), state(model)
    found = evaluate(
        model, Numbers(chat), PROMPTS, [(lock, 3.0), (lock, 9.0)], judge=odd, new_tokens=5, batch_size=batch_size
    )
    assert [(one.lock, one.strength) for one in found] == [(None, None), (lock.digest, 3.0), (lock.digest, 9.0)]
    texts = set()
    for one in found:
        with unfolded(model, lock, one.strength or 0.0):
            for answers, prompts in ((one.harmful, PROMPTS.harmful), (one.harmless, PROMPTS.harmless)):
                ids = [
                    [60, 61, *map(int, p.split()), 62] if chat else [1, 50, *map(int, p.split()), 51] for p in prompts
                ]
                expected = [naive_answer(model, row, 5) for row in ids]
                assert [(a.prompt, a.text) for a in answers] == list(zip(prompts, expected, strict=True))
                assert [a.refused for a in answers] == [odd("", text) for text in expected]
                texts |= set(expected)
            assert one.perplexity == pytest.approx(naive_perplexity(model, PROMPTS.texts), rel=1e-5)
        assert one.refusals == sum(a.refused for a in one.harmful) / 4
        assert one.over_refusals == sum(a.refused for a in one.harmless) / 2
    assert len(texts) > 6  # the locks do change the answers
    assert same_state(state(model), before)


def test_a_relocked_model_is_asked_as_it_is_and_stays_so() -> None:
    """Without locks only: what it is, is no measure of what another lock does to it."""
    model = exact_model("llama")
    lock, other = random_lock(model), random_lock(model, seed=7)
    fastlock.relock(model, lock, 3.0)
    [one] = evaluate(model, Numbers(True), PROMPTS, judge=odd, new_tokens=4)
    for tried in (lock, other):
        with pytest.raises(fastlock.FastlockError, match=r"is relocked, .*Unlock it first.*Or leave the locks out"):
            evaluate(model, Numbers(True), PROMPTS, [(tried, 2.0)], judge=odd, new_tokens=4)
    assert fastlock.verify(model, lock)
    fastlock.unlock(model)
    with unfolded(model, lock, 3.0):
        assert one.perplexity == pytest.approx(naive_perplexity(model, PROMPTS.texts), rel=1e-5)


def test_batches_are_halved_when_memory_runs_out(monkeypatch) -> None:
    model = exact_model("llama")
    whole, sizes = model.generate, []

    def generate(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("too much")
        return whole(input_ids, **options)

    room = 16
    expected = evaluate(model, Numbers(True), PROMPTS, judge=odd, new_tokens=4)
    monkeypatch.setattr(model, "generate", generate)
    room = 1
    assert evaluate(model, Numbers(True), PROMPTS, judge=odd, new_tokens=4) == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1, 2, 1, 1]
    room = 0
    with pytest.raises(fastlock.FastlockError, match="one prompt of"):
        evaluate(model, Numbers(True), PROMPTS, judge=odd, new_tokens=4)


TEXTS = Prompts(texts=tuple(" ".join(str(5 + (i * j) % 90) for j in range(1, 2 + i)) for i in (3, 1, 9, 30, 2)))


def test_a_broken_models_perplexity_fits_into_json() -> None:
    model = exact_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    (found,) = evaluate(model, Numbers(True), TEXTS)
    assert found.perplexity == math.inf
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Evaluation.from_dict(data) == found
    assert "| inf |" in report_markdown([found], {})
    assert "inf" not in report_html([found], {}).split("<h2>Results")[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_a_long_text_what_the_model_can_read(kind: str, monkeypatch) -> None:
    model = exact_model(kind)
    most = model.config.max_position_embeddings
    text = " ".join(str(3 + i % 90) for i in range(most + 40))
    (found,) = evaluate(model, Numbers(True), Prompts(texts=(text,)))
    read = " ".join(text.split()[: most - 1])  # there is a token before them
    assert found.perplexity == pytest.approx(naive_perplexity(model, (read,)), rel=1e-5)
    monkeypatch.setattr(evaluate_module, "MAX_TEXT_TOKENS", 9)
    (found,) = evaluate(model, Numbers(True), Prompts(texts=(text,)))
    assert found.perplexity == pytest.approx(naive_perplexity(model, (" ".join(text.split()[:8]),)), rel=1e-5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            Prompts(harmful=("5", " ".join(["5"] * 50))),
            "prompt 2: it makes 53 tokens, and its answer may take 32",
        ),
        (Prompts(harmless=("5 128",)), "harmless prompt 1: the tokenizer gives token 128, but GPT2LMHeadModel has 128"),
        (Prompts(texts=("5 6", "5 128")), "text 2: the tokenizer gives token 128"),
        (Prompts(texts=("5 6", " \u2003x")), "text 2 .* is a single token"),
    ],
)
def test_prompts_that_the_model_can_not_read(prompts: Prompts, message: str, monkeypatch) -> None:
    """Refused before anything is asked."""
    model, tokenizer = tiny_model("gpt2"), Numbers(True)
    if prompts.texts[1:] == (" \u2003x",):
        whole = Numbers.__call__
        monkeypatch.setattr(Numbers, "__call__", lambda self, text: whole(self, text.replace("x", "")))
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(fastlock.FastlockError, match=message):
        evaluate(model, tokenizer, prompts)


def test_a_prompt_that_just_leaves_room_for_its_answer() -> None:
    model = tiny_model("gpt2")
    most = model.config.max_position_embeddings
    prompt = " ".join(["5"] * (most - 3 - 20))  # three tokens stand around it
    assert evaluate(model, Numbers(True), Prompts(harmful=(prompt,)), new_tokens=20)[0].harmful[0].text
    with pytest.raises(fastlock.FastlockError, match="--new-tokens"):
        evaluate(model, Numbers(True), Prompts(harmful=(prompt,)), new_tokens=21)


def test_only_some_kinds_of_prompts() -> None:
    model = tiny_model("llama")
    (one,) = evaluate(model, Numbers(True), Prompts(harmless=("5 6",)), new_tokens=2)
    assert (one.refusals, one.perplexity, interval(one.harmful)) == (None, None, None)
    assert one.over_refusals == 0.0
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["refusals_interval"] is None


@pytest.mark.parametrize("what", [{"new_tokens": 0}, {"batch_size": 0}, {"batch_size": 1.5}, {"new_tokens": True}])
def test_numbers_that_make_no_sense(what: dict[str, Any]) -> None:
    with pytest.raises(fastlock.FastlockError, match="an integer from 1"):
        evaluate(tiny_model("llama"), Numbers(True), PROMPTS, **what)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_interval_is_wilsons(counts: tuple[int, int]) -> None:
    n, refused = counts
    low, high = interval([Answer("", "", i < refused) for i in range(n)])
    z, share = 1.959963984540054, refused / n
    # The ends are where (p - share)^2 = z^2 p (1 - p) / n.
    ends = np.roots([1 + z * z / n, -(2 * share + z * z / n), share * share])
    assert (low, high) == pytest.approx(sorted(ends), abs=1e-9)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
