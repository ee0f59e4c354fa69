"""The share of a zoo that one of several machines does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastlock.errors import FastlockError

T = TypeVar("T")


def check_share(rank: int | None, world_size: int | None) -> None:
    """Refuse a share that there is not.

    Raises:
        FastlockError: one of the two is missing, or the rank is not from 0 to the world size less one.
    """
    if rank is None and world_size is None:
        return
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise FastlockError(
            f"the rank is {rank}, and the world size {world_size}. Give both: the rank is from 0 to the world size "
            "less one."
        )


def share_of(checkpoints: Sequence[T], rank: int | None, world_size: int | None) -> list[T]:
    """What this rank does; all of it if there are no ranks. Raises as `check_share`."""
    check_share(rank, world_size)
    return list(checkpoints[rank::world_size])
