"""Work in batches on a device whose memory may run out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from fastlock.errors import FastlockError

T = TypeVar("T")
R = TypeVar("R")

# What torch says, in a plain RuntimeError, where the memory that ran out is not CUDA's.
_OTHER_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory")


def in_halves(batch: Sequence[T], work: Callable[[Sequence[T]], list[R]], name: Callable[[T], str]) -> list[R]:
    """Do `work(batch)`, and where memory runs out, the work on one half of the batch and then on the other.

    Args:
        batch: at least one item.
        work: what to do with some of the items.
        name: what an item is called in the message.

    Returns:
        What `work` returns for the items, in their order.

    Raises:
        FastlockError: memory runs out with a single item.
    """
    try:
        return work(batch)
    except RuntimeError as error:
        texts = _OTHER_OUT_OF_MEMORY
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in texts):
            raise
        if len(batch) == 1:
            raise FastlockError(
                f"memory runs out with {name(batch[0])} alone. Load the model in fewer bits, or on more or larger "
                "devices (device_map='auto')."
            ) from None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # outside the handler, whose error holds on to what ran out
    half = len(batch) // 2
    return in_halves(batch[:half], work, name) + in_halves(batch[half:], work, name)


Progress = Callable[[Sequence[Any], str], Iterable[Any]]
"""Given items and a description, the same items, while it shows how many are done."""


def no_progress(items: Sequence[Any], _description: str) -> Iterable[Any]:
    """The progress that shows nothing."""
    return items


Row = list[int]
"""The tokens of one text."""


def in_batches(
    rows: Sequence[Row], work: Callable[[Sequence[Row]], list[T]], batch_size: int, progress: Progress, description: str
) -> list[T]:
    """Do `work` on rows in batches of similar lengths, which need the least padding.

    Args:
        rows: tokens, of any lengths.
        work: what to do with a batch; one result for each of its rows.
        batch_size: how many rows go together; halved as often as memory runs out.
        progress, description: what shows how far it is.

    Returns:
        What `work` makes of each row, in the order of the rows.

    Raises:
        FastlockError: memory runs out with a single row.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    results: dict[int, T] = {}
    for start in progress(range(0, len(order), batch_size), description):
        batch = order[start : start + batch_size]
        results |= zip(batch, in_halves([rows[i] for i in batch], work, row_name), strict=True)
    return [results[i] for i in range(len(rows))]


def row_name(row: Row) -> str:
    """What a row is called in a message."""
    return f"one prompt of {len(row)} tokens"
