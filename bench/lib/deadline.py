"""How the steps of a run share the time that it has."""

from __future__ import annotations

from collections.abc import Sequence

# A step that would get less of its limit than this is not run.
LEAST = 0.5


def shares(limits: Sequence[float], left: float) -> list[float]:
    """How many of the seconds that are left each of the steps to come may take; 0 for those that no longer fit.

    They share in proportion to their limits. What a step leaves goes to those after it, and one that takes all it may
    takes nothing from them. Where not all can have LEAST of their limits, the last ones get nothing.
    """
    fitting = list(limits)
    while fitting and left < LEAST * sum(fitting):
        fitting.pop()
    of_limit = left / sum(fitting) if fitting else 0.0
    return [of_limit * limit for limit in fitting] + [0.0] * (len(limits) - len(fitting))
