"""Work in batches on a device whose memory may run out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from fastlock.errors import FastlockError

T = TypeVar("T")
R = TypeVar("R")

# What torch says, in a plain RuntimeError, where the memory that ran out is not CUDA's.
_ELSEWHERE = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")


def in_halves(batch: Sequence[T], work: Callable[[Sequence[T]], list[R]], name: Callable[[T], str]) -> list[R]:
    """`work(batch)`; where memory runs out, what it returns for one half of the batch, and for the other.

    Args:
        batch: at least one thing.
        work: what to do with some of them.
        name: what one of them is called, for the message.

    Raises:
        FastlockError: memory runs out with one thing alone.
    """
    try:
        return work(batch)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _ELSEWHERE):
            raise
        if len(batch) == 1:
            raise FastlockError(
                f"memory runs out with {name(batch[0])} alone. Load the model in fewer bits, or on more or larger "
                "devices (device_map='auto')."
            ) from None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # outside of the handler, whose error holds what ran out
    half = len(batch) // 2
    return in_halves(batch[:half], work, name) + in_halves(batch[half:], work, name)


Progress = Callable[[Sequence[Any], str], Iterable[Any]]


def no_progress(items: Sequence[Any], _description: str) -> Iterable[Any]:
    """The progress that shows nothing."""
    return items


Row = list[int]


def in_batches(
    rows: Sequence[Row], work: Callable[[Sequence[Row]], list[T]], batch_size: int, progress: Progress, what: str
) -> list[T]:
    """What `work` makes of each row, in the rows' order; batches of like lengths need the least padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    done: dict[int, T] = {}
    for start in progress(range(0, len(order), batch_size), what):
        batch = order[start : start + batch_size]
        done |= zip(batch, in_halves([rows[i] for i in batch], work, row_name), strict=True)
    return [done[i] for i in range(len(rows))]


def row_name(row: Row) -> str:
    """What a row is called in a message."""
    return f"one prompt of {len(row)} tokens"
