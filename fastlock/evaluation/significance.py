"""How sure a count is: intervals of shares, and tests of paired verdicts. No libraries, no randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score interval, without continuity correction).

    Args:
        successes: how often it happened.
        trials: of how many times; at least one.
    """
    share, n, z = successes / trials, trials, _Z
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: how often chance alone splits the differing pairs so unevenly, or more so.

    Args:
        only_first: in how many pairs only the first of the two happened.
        only_second: in how many only the second did.
    """
    differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**differing))


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's correction: the chances of several tests, each adjusted, so that any of them errs no more often than one.

    Args:
        chances: the p of each test.
    """
    order = sorted(range(len(chances)), key=lambda test: chances[test])
    adjusted, largest = [0.0] * len(chances), 0.0
    for rank, test in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[test]))
        adjusted[test] = largest
    return adjusted
