"""Numbers as a report says them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


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


# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at most ten values, and half the width of its 95 % interval (Student's t); NaN for one value."""
    half = math.nan
    if len(values) > 1:
        half = _T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


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
