"""Numbers as a report says them."""

from __future__ import annotations

import math
import statistics


def interval_of_median(values: list[float]) -> list[float] | None:
    """The median and its 95 % interval by order statistics: [median, low, high]; the extremes below 6 values."""
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while below + 1 < n / 2 and tail + math.comb(n, below + 1) * 0.5**n <= 0.025:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return [statistics.median(ordered), ordered[below], ordered[n - 1 - below]]


def span_text(interval: list[float]) -> str:
    """A median of seconds and its interval."""
    median, low, high = interval
    return f"{time_text(median)} ({time_text(low)}–{time_text(high)})"


def time_text(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def yes_text(value: bool) -> str:
    """Yes or no."""
    return "yes" if value else "no"
