"""When Lisa trains on what, and how hard it pulls: pure functions of the optimizer step."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

from fastlock.errors import FastlockError, check_number

State = Literal["alignment", "user"]

_MOST_STEPS = sys.maxsize


@dataclass(frozen=True)
class Lisa:
    """Lisa's schedule (arXiv 2405.18641): alternate between alignment data and the user's, and pull the weights back.

    In either state the optimizer adds pull · (w - anchor) to the gradient, the gradient of the paper's proximal term
    pull/2 · ‖w - anchor‖²; the anchor holds the weights at the last switch of the state. Steps are optimizer steps,
    counted from 0, whatever the accumulation and the number of ranks.

    Attributes:
        alignment_steps: steps on alignment data before each run of steps on the user's (the paper's K1: 100). 0 leaves
            the alignment data out; the weights are then pulled to where they started.
        user_steps: steps on the user's data before the next switch (the paper's K2: 900).
        pull: ρ, 0 or more (the paper's 1). 0 alternates without pulling.
        free_steps: no pull in the first so many steps, and on until the state switches. (The authors' code has it for
            a tenth of the training; the paper does not.)

    Raises:
        FastlockError: a number is not what it must be.
    """

    alignment_steps: int
    user_steps: int
    pull: float
    free_steps: int = 0

    def __post_init__(self) -> None:
        check_number("alignment_steps", self.alignment_steps, 0, _MOST_STEPS)
        check_number("user_steps", self.user_steps, 1, _MOST_STEPS)
        check_number("free_steps", self.free_steps, 0, _MOST_STEPS)
        number = isinstance(self.pull, (int, float)) and not isinstance(self.pull, bool)
        if not number or not math.isfinite(self.pull) or self.pull < 0:
            raise FastlockError(f"pull is {self.pull!r}; it must be a number, 0 or more.")
        if self.free_steps and not self.alignment_steps:
            raise FastlockError(
                f"free_steps is {self.free_steps}, but alignment_steps is 0: free steps end when the state switches, "
                "which it never does. Leave free_steps out, or give alignment_steps."
            )

    def state(self, step: int) -> State:
        """What a step trains on: "alignment" if step mod (alignment_steps + user_steps) < alignment_steps."""
        return "alignment" if step % self._period < self.alignment_steps else "user"

    def switches_at(self, step: int) -> bool:
        """Whether the anchor is taken before this step: at the first, and wherever the state is another than before."""
        return step == 0 or self.state(step) != self.state(step - 1)

    def pull_at(self, step: int) -> float:
        """The pull in this step: 0 as long as the steps are free."""
        return self.pull if self._last_switch(step) >= self.free_steps else 0.0

    def user_steps_before(self, step: int) -> int:
        """How many of the steps before this one train on the user's data."""
        periods, rest = divmod(step, self._period)
        return periods * self.user_steps + max(0, rest - self.alignment_steps)

    def step_of(self, user_step: int) -> int:
        """The step that is the `user_step`-th, counted from 0, of those on the user's data."""
        periods, rest = divmod(user_step, self.user_steps)
        return periods * self._period + self.alignment_steps + rest

    @property
    def _period(self) -> int:
        return self.alignment_steps + self.user_steps

    def _last_switch(self, step: int) -> int:
        if not self.alignment_steps:
            return 0
        start = step - step % self._period
        return start if self.state(step) == "alignment" else start + self.alignment_steps
