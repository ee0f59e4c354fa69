"""Prompts, trials and measurements for tests of calibration."""

from __future__ import annotations

from typing import Any

import pytest

import fastlock
from fastlock.evaluation.prompts import Prompts
from fastlock.recipes.measuring import Measuring
from fastlock.recipes.trials import Measurement, Trial
from tests.helpers.families import tiny_model, word_tokenizer

PAIRS = fastlock.shipped_pairs()[:6]

PROMPTS = Prompts(
    harmful=tuple(f"harm {i} it" for i in range(8)),
    harmless=tuple(f"good {i} day" for i in range(6)),
    texts=("the quick brown fox jumps", "over the lazy dog again", "and once more"),
)


def trial(refusals: float, over_refusals: float, cost: float, heads: int = 4) -> Trial:
    return Trial("prompt-end", 1, heads, 1.0, refusals, over_refusals, cost)


def at(strength: float, refusals: float = 0.0, over_refusals: float = 0.0, cost: float = 1.0) -> Trial:
    """A trial of a lock that is given."""
    return Trial(None, None, None, strength, refusals, over_refusals, cost)


def small() -> tuple[Any, Any]:
    model = tiny_model("llama", num_hidden_layers=4, vocab_size=4096)
    return model, word_tokenizer(fastlock.shipped_pairs())


def odd(_prompt: str, answer: str) -> bool:
    return len(answer) % 2 == 1


def steered(monkeypatch: pytest.MonkeyPatch, stop_in: int | None = None) -> None:
    """Stand-in measurements that the search can follow; Ctrl-C in one of them, counted from 0."""
    counted = iter(range(1000))

    def measure(_self: Any, lock: Any, strength: float) -> Measurement:
        if next(counted) == stop_in:
            raise KeyboardInterrupt
        return Measurement(len(lock) / 16, over_refusals=strength / 8, cost=1 + abs(strength - 2))

    monkeypatch.setattr(Measuring, "measure", measure)
