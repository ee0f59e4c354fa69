"""Work that several processes share, each doing its part one after the other: what a zoo's workers are held against."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def rate_of_shares(share: Callable[..., None], arguments: tuple[Any, ...], processes: int, count: int) -> float:
    """Things done a second, from when the first process begins with its part to when the last is done.

    Args:
        share: what each process calls, with these arguments, its rank, how many processes there are, and a queue, into
            which it puts when it began and ended.
        arguments: that a new process can be given.
        processes: how many.
        count: how many things they do together.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    started = [context.Process(target=share, args=(*arguments, rank, processes, results)) for rank in range(processes)]
    for process in started:
        process.start()
    spans = [results.get() for _ in started]
    for process in started:
        process.join()
    return float(count / (max(end for _, end in spans) - min(start for start, _ in spans)))
