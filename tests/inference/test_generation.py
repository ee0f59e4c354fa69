"""Greedy answers and losses in batches, against a model that is asked one prompt and one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastlock.inference.batching import Row, in_batches, no_progress
from fastlock.inference.generation import evaluating, generate, losses
from tests.helpers.families import tiny_model
from tests.helpers.reading import Numbers, exact_model, naive_answer, naive_perplexity

TEXTS = tuple(" ".join(str(5 + (i * j) % 90) for j in range(1, 2 + i)) for i in (3, 1, 9, 30, 2))
ROWS = [[1, *map(int, text.split())] for text in TEXTS]
PROMPTS = [[60, 61, *row, 62] for row in ([5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15], [16, 17, 18, 19, 20])]


def answers(model: Any, tokenizer: Any, rows: list[Row], new_tokens: int) -> list[str]:
    with evaluating(model):
        return generate(model, tokenizer, rows, new_tokens)


def perplexity(model: Any, batch_size: int) -> float:
    with evaluating(model):
        sums = in_batches(ROWS, lambda batch: losses(model, batch), batch_size, no_progress, "")
    return math.exp(sum(sums) / sum(len(row) - 1 for row in ROWS))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_perplexity_in_batches_is_that_of_one_text_at_a_time(kind: str) -> None:
    model = exact_model(kind)
    found = [perplexity(model, size) for size in (1, 2, 16)]
    assert found == pytest.approx([naive_perplexity(model, TEXTS)] * 3, rel=1e-5)
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-9)


@pytest.mark.parametrize("kind", ["bloom", "gemma2"])
def test_perplexity_in_batches_with_eager_attention(kind: str) -> None:
    """ALiBi, and sliding windows, which are made of the mask; in float32, for eager attention's sake."""
    model = tiny_model(kind)
    found = [perplexity(model, size) for size in (1, 2, 16)]
    assert found == pytest.approx([naive_perplexity(model, TEXTS)] * 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_in_a_batch_are_those_of_one_prompt_at_a_time(kind: str) -> None:
    model = exact_model(kind)
    expected = [naive_answer(model, row, 6) for row in PROMPTS]
    assert answers(model, Numbers(True), PROMPTS, 6) == expected
    assert len(set(expected)) == len(PROMPTS)


@pytest.mark.parametrize(("pad", "end"), [(128, 2), (128, None), (128, 500), (None, None)])
def test_a_padding_token_that_the_model_does_not_have(pad: int | None, end: int | None) -> None:
    """As a fine-tune adds one, without a place for it in the model."""
    model, tokenizer = exact_model("llama"), Numbers(True)
    expected = answers(model, tokenizer, PROMPTS, 5)
    tokenizer.pad_token_id, tokenizer.eos_token_id = pad, end  # type: ignore[assignment]
    assert answers(model, tokenizer, PROMPTS, 5) == expected


def test_what_follows_the_end_of_an_answer_is_no_part_of_it() -> None:
    """Padding does, which may be any token."""
    model, tokenizer = exact_model("llama"), Numbers(True)
    tokenizer.pad_token_id = 40  # type: ignore[assignment]
    whole = answers(model, tokenizer, PROMPTS, 9)
    ends = [2, int(whole[0].split()[2])]
    model.generation_config.eos_token_id = ends
    texts = answers(model, tokenizer, PROMPTS, 9)
    assert len({len(text.split()) for text in texts}) > 1  # they end at different times
    for text, row in zip(texts, PROMPTS, strict=True):
        assert [text] == answers(model, tokenizer, [row], 9)
        assert not any(int(token) in ends for token in text.split())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"repetition_penalty": 1.9},
        {"no_repeat_ngram_size": 1},
        {"return_dict_in_generate": True},
        {"stop_strings": ["5"]},
        {"suppress_tokens": list(range(3, 100))},
        {"min_new_tokens": 4, "max_length": 3},
        {"do_sample": True, "temperature": 9.0},
    ],
)
def test_answers_are_greedy_whatever_the_generation_config_says(options: dict[str, Any]) -> None:
    model = exact_model("llama")
    expected = answers(model, Numbers(True), PROMPTS, 6)
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    held = model.generation_config
    assert answers(model, Numbers(True), PROMPTS, 6) == expected
    assert model.generation_config is held
    assert {name: getattr(held, name) for name in options} == options


def test_a_model_in_training_stays_in_training() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model.transformer.h[1].training
    assert model.transformer.h[0].training
    assert torch.is_grad_enabled()
