"""What decides a fine-tune, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fastlock.errors import FastlockError, check_number
from fastlock.finetuning.lisa_schedule import Lisa

_LARGE = 2**31
# The paper's K1 and K2, and how many turns of both a run should have at least for the alternation to act.
_ALIGNMENT_STEPS, _USER_SHARE, _TURNS = 100, 9, 10


@dataclass(frozen=True)
class FinetuneSettings:
    """What decides a fine-tune.

    Attributes:
        lisa: the schedule; None chooses one by the length of the run.
        lora: the rank of adapters; None trains the weights.
        epochs: passes through the user's data, or parts of one.
        batch_size: rows in a batch.
        accumulation: batches in an optimizer step.
        lr: the first learning rate; it falls linearly to 0. None: 1e-5, or 1e-4 for adapters.
        max_length: tokens that a row may have; longer answers are cut.
        save_every: steps between checkpoints.
        seed: of the order of rows, of adapters and of dropout.

    Raises:
        FastlockError: a number is not what it must be.
    """

    lisa: Lisa | None = None
    lora: int | None = None
    epochs: float = 3.0
    batch_size: int = 4
    accumulation: int = 1
    lr: float | None = None
    max_length: int = 1024
    save_every: int = 100
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "save_every"):
            check_number(name, getattr(self, name), 1, _LARGE)
        check_number("max_length", self.max_length, 2, _LARGE)
        check_number("seed", self.seed, 0, 2**32 - 1)
        if self.lora is not None:
            check_number("lora", self.lora, 1, _LARGE)
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise FastlockError(f"{name} is {value!r}; it must be above 0.")

    @property
    def learning_rate(self) -> float:
        """The first learning rate."""
        return self.lr or (1e-5 if self.lora is None else 1e-4)

    def schedule(self, user_rows: int, aligned: bool) -> Lisa:
        """The schedule of a run: the given one, the paper's 100 and 900 steps, or less for a run too short for them.

        Args:
            user_rows: rows of the user's data.
            aligned: whether there is alignment data; without, nothing alternates.
        """
        if not aligned:
            return Lisa(0, 1, 0.0)
        if self.lisa is not None:
            return self.lisa
        user_steps = math.ceil(-(-user_rows // (self.batch_size * self.accumulation)) * self.epochs)
        steps = min(_ALIGNMENT_STEPS, max(1, user_steps // (_USER_SHARE * _TURNS)))
        return Lisa(steps, _USER_SHARE * steps, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The settings as data that JSON can hold."""
        return asdict(self)
