"""Several ways to do the same, timed in turn on one device: their rounds, and how they are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from bench.lib import machine


def seconds_of(run: Callable[[], object], rounds: int, wait: int | None) -> list[float]:
    """Seconds of each round.

    Args:
        run: what is timed.
        rounds: how often.
        wait: cycles for which the device sleeps while all of it is queued, to be timed there between two events; None:
            by the host's clock, and waited for.
    """
    found = []
    for _ in range(rounds):
        machine.synchronize(machine.device())
        if wait is not None:
            found.append(machine.between_events(run, lambda: torch.cuda._sleep(wait)))
            continue
        start = time.perf_counter()
        run()
        machine.synchronize(machine.device())
        found.append(time.perf_counter() - start)
    return [seconds for seconds in found if not math.isnan(seconds)] or [math.inf]
