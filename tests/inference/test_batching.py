"""Batches of similar lengths, halved as often as memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastlock import FastlockError
from fastlock.inference.batching import in_batches, in_halves, no_progress
from fastlock.inference.generation import evaluating, generate, losses
from tests.helpers.reading import Numbers, exact_model

ROWS = [[5 + (i * j) % 90 for j in range(1, 2 + i)] for i in (3, 1, 9, 30, 2)]

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 12"),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
}


def short_of_memory(room: int, error: Callable[[], Exception] = ERRORS["cuda"]) -> tuple[list[int], Any]:
    """Work whose memory runs out with more than so many items at once; the sizes that it was asked for."""
    sizes: list[int] = []

    def work(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > room:
            raise error()
        return [item * item for item in batch]

    return sizes, work


@pytest.mark.parametrize("where", ERRORS)
def test_a_batch_is_halved_as_often_as_memory_runs_out(where: str) -> None:
    sizes, work = short_of_memory(2, ERRORS[where])
    assert in_halves(range(6), work, str) == [0, 1, 4, 9, 16, 25]
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    sizes, work = short_of_memory(0, ERRORS[where])
    with pytest.raises(FastlockError, match="memory runs out with number 7 alone"):
        in_halves(range(7, 13), work, lambda item: f"number {item}")
    assert sizes == [6, 3, 1]


def test_another_error_is_not_taken_for_memory() -> None:
    sizes, work = short_of_memory(0, lambda: RuntimeError("CUDA error: an illegal access"))
    with pytest.raises(RuntimeError, match="illegal access"):
        in_halves(range(6), work, str)
    assert sizes == [6]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_like_lengths_go_together_and_results_keep_their_order(batch_size: int) -> None:
    batches: list[list[int]] = []

    def work(batch: Sequence[list[int]]) -> list[int]:
        batches.append([len(row) for row in batch])
        return [row[-1] for row in batch]

    seen: list[tuple[int, str]] = []

    def progress(items: Any, description: str) -> Any:
        seen.append((len(items), description))
        return items

    assert in_batches(ROWS, work, batch_size, progress, "Reading") == [row[-1] for row in ROWS]
    expected = [2, 3, 4, 10, 31]
    assert batches == [expected[start : start + batch_size] for start in range(0, 5, batch_size)]
    assert seen == [(len(batches), "Reading")]


@pytest.mark.parametrize("what", ["generate", "forward"])
def test_a_models_batches_are_halved_when_memory_runs_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, room, sizes = exact_model("llama"), 16, list[int]()
    whole = getattr(model, what)

    def limited(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("too much")
        return whole(input_ids, **options)

    def work(batch: Sequence[list[int]]) -> list[Any]:
        return generate(model, Numbers(True), batch, 4) if what == "generate" else list(losses(model, batch))

    def results() -> list[Any]:
        with evaluating(model):
            return in_batches(ROWS, work, 16, no_progress, "")

    expected = results()
    monkeypatch.setattr(model, what, limited)
    room = 1
    halved = results()
    assert halved == (expected if what == "generate" else pytest.approx(expected, rel=1e-9))
    assert sizes == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    room = 0
    with pytest.raises(FastlockError, match="memory runs out with one prompt of 2 tokens alone"):
        results()
