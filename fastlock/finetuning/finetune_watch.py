"""What watches a fine-tune from the command line: its progress, and losses that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import transformers

from fastlock.errors import FastlockError
from fastlock.inference.batching import Progress


class TrainingWatch(transformers.TrainerCallback):
    """Shows progress, and ends a training whose loss or gradient is not a number, before it is saved."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._steps: Iterator[Any] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin where the run is resumed."""
        self._steps = iter(self._progress(range(state.global_step, state.max_steps), "training"))
        next(self._steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more step is done; before it is saved, it is logged, and so looked at."""
        next(self._steps, None)
        control.should_log = control.should_log or control.should_save

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the progress end."""
        for _step in self._steps:
            pass

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Refuse to go on with what is not a number."""
        for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradient")):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise not_finite(f"{what} is {value} at step {state.global_step}")


def not_finite(what: str) -> FastlockError:
    """The error of a training that went astray."""
    return FastlockError(
        f"{what}: the training has diverged, and was stopped; none of that was saved. Give a new directory and a "
        "smaller --lr, and look for rows that are nothing but noise."
    )
