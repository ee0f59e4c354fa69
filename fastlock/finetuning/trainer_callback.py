"""Relocking a model at the end of a Trainer's run."""

from __future__ import annotations

from typing import Any, cast

import transformers

from fastlock.errors import UnsupportedError
from fastlock.locks.lock import Lock, check_lock, strength_for
from fastlock.locks.receipt import Receipt
from fastlock.models.reloaded import check_unlocked, receipt_of
from fastlock.models.relocking import relock, relocked, unlock
from fastlock.models.saving import carried_model
from fastlock.models.sites import unwrapped


class TrainerCallback(transformers.TrainerCallback):
    """Relocks the model at the end of any run of a transformers or TRL Trainer.

    Before the first step, the model is relocked and unlocked once, and it is made sure that it can be saved relocked:
    what would fail at the end fails there. The checkpoints of the run hold the weights without the lock, so it can be
    resumed from them; the lock is put in after the last one, and after the best one is loaded
    (`load_best_model_at_end`). From then on, `trainer.save_model(DIR)` and `model.save_pretrained(DIR)` save the
    relocked model. A run that fails or is interrupted leaves the model as trained. If the same Trainer trains once
    more, the lock is taken out first.

        trainer = transformers.Trainer(model, args, ..., callbacks=[fastlock.TrainerCallback(lock)])
        trainer.train()
        trainer.save_model("tuned")

    Attributes:
        receipt: what was done; None until the end of a run.

    Args:
        lock: the lock, calibrated on this model's base, or on an earlier fine-tune of it.
        strength: α; by default the one that the lock was calibrated at, or else the paper's 6.

    Raises:
        FastlockError, and its kinds: as for `relock`: at once for the lock and the strength, and when training begins
            for what the model cannot take: adapters, shards, or a family whose files have no place for the lock.
    """

    def __init__(self, lock: Lock, strength: float | None = None) -> None:
        check_lock(lock)
        self._lock, self._strength = lock, strength_for(lock, strength)
        self.receipt: Receipt | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Try everything that will be done at the end, and undo it."""
        _check_no_adapters(model)
        inner = unwrapped(model)
        if self.receipt is not None and receipt_of(inner) is not None:
            unlock(model)
        check_unlocked(inner, "training would change what the lock is folded from")
        self.receipt = None
        with relocked(model, self._lock, self._strength):
            carried_model(cast("transformers.PreTrainedModel", inner))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Relock."""
        self.receipt = relock(model, self._lock, self._strength)


def _check_no_adapters(model: Any) -> None:
    if hasattr(model, "peft_config"):
        raise UnsupportedError(
            f"{type(model).__name__} trains adapters, and a lock is folded through the weights that they will be "
            "merged into. Leave the callback out; afterwards merge them (merge_and_unload), and relock what comes out."
        )
