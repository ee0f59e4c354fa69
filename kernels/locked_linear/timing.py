"""Ways timed in turn on a device that is warm, and the fastest of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fastlock.kernels.locked_linear.tiles import Way

# An idle GPU's clocks are at a fraction, and take some tens of milliseconds of work to rise.
WARM_UP_SECONDS = 0.03
# Even: see `in_turn`.
ROUNDS = 6
# Some milliseconds, in which the host queues ten runs.
HOLD_CYCLES = 8_000_000
# Of equally fast ways the one that comes first here is taken: the plainer one.
PLAINEST = ("torch", "add", "around", "gather", "shift")


def in_turn(ways: Sequence[Way], turn: Callable[[Way], float]) -> dict[Way, float]:
    """What each way takes: the median of ROUNDS turns, once the turns before had lasted WARM_UP_SECONDS.

    Every way has one turn a round, and every other round goes backwards. Clocks that still drift thus meet all ways
    alike: the two turns in the middle of each way's are as far from the middle of all.

    Args:
        ways: those that run.
        turn: runs one, and says how many seconds that took.
    """
    start = time.perf_counter()
    while ways:
        for way in ways:
            turn(way)
        if time.perf_counter() - start >= WARM_UP_SECONDS:
            break
    turns: dict[Way, list[float]] = {way: [] for way in ways}
    for i in range(ROUNDS):
        for way in ways if i % 2 == 0 else reversed(ways):
            turns[way].append(turn(way))
    return {way: statistics.median(of_way) for way, of_way in turns.items()}


def on_device(queue: Callable[[], object]) -> float:
    """Seconds that the device takes for what is queued on its current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device waits while the host queues all of it, so that the host's pace is not in the time.
    torch.cuda._sleep(HOLD_CYCLES)
    start.record()
    queue()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def fastest(times: Mapping[Way, float]) -> Way:
    """The way that takes the least time: of several such the plainest, by PLAINEST, then the first."""
    return min(times, key=lambda way: (times[way], PLAINEST.index(way.kind)))
