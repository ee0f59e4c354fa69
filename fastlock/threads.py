"""Threads that share work, in each of which torch keeps to that one.

Torch's own share the work of every step, and wait for each other after it. Small steps then take longer than alone, and
on busy cores a hundred times as long.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads_for(items: int) -> int:
    """How many threads share so many items: at most as many as torch has in this one."""
    return min(torch.get_num_threads(), MAX_THREADS, items)


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int | None = None) -> list[Result]:
    """The function's result for each item, by several threads; in this one, if torch has no other here.

    Args:
        function: what to do.
        items: with what.
        threads: how many; by default `threads_for(len(items))`.

    Raises:
        Exception: what the function raised for the first item for which it did.
    """
    threads = threads_for(len(items)) if threads is None else threads
    if torch.get_num_threads() == 1 or not items:
        return [function(item) for item in items]
    with started_threads(threads) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def started_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads as long as the block lasts; what they have not begun by its end, they do not begin."""
    available = torch.get_num_threads()
    started = threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, initializer=_begin, initargs=(started,))
    try:
        try:
            for _ in range(count):  # each of which starts one
                pool.submit(int)
            started.wait()
        except BaseException:
            started.abort()
            raise
        finally:
            torch.set_num_threads(available)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(started: threading.Barrier) -> None:
    """Let torch keep to this thread. So it would in every new one, until whoever waits at the barrier undoes that."""
    torch.get_num_threads()  # by which this thread has a number of its own
    torch.set_num_threads(1)
    started.wait()
