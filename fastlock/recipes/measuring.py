"""How a trial is measured: the relocked model itself is asked, and compared with the baseline."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlock.errors import FastlockError
from fastlock.evaluation.evaluator import Evaluation, evaluate
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.prompts import Prompts
from fastlock.locks.lock import Lock
from fastlock.models.relocking import relocked
from fastlock.recipes.trials import MAX_OVER_REFUSALS, Measurement

Cost = Callable[[nn.Module, Any], float]
"""Given a model and its tokenizer, a positive number, or NaN for a broken model: what a lock may barely raise."""


@dataclass(frozen=True)
class Measuring:
    """How a model is measured, with any lock or none.

    Attributes:
        model, tokenizer: what is measured.
        prompts: what decides between trials.
        cost: what a lock may barely raise; None for the perplexity of the prompts' texts.
        judge, new_tokens, batch_size: as for `fastlock.evaluate`.
    """

    model: nn.Module
    tokenizer: Any
    prompts: Prompts
    cost: Cost | None
    judge: Judge
    new_tokens: int
    batch_size: int

    @functools.cached_property
    def baseline(self) -> Evaluation:
        """The model without a lock."""
        return self._evaluation()

    @functools.cached_property
    def baseline_cost(self) -> float:
        """What the model costs without a lock.

        Raises:
            FastlockError: that is not a finite number above 0.
        """
        cost = self._cost(self.baseline)
        if cost == math.inf:
            raise FastlockError(
                "the model's cost without a lock is nan or infinite; it must be a finite number above 0."
            )
        return cost

    def measure(self, lock: Lock, strength: float) -> Measurement:
        """What a lock does at a strength; at strength 0, what the baseline does.

        Raises:
            FastlockError: the cost is not a number above 0; or as for `fastlock.evaluate` and `fastlock.relock`.
        """
        evaluation, cost = self.baseline, self.baseline_cost
        if strength:
            with relocked(self.model, lock, strength):
                evaluation = self._evaluation()
                cost = self._cost(evaluation)
        return Measurement(
            refusals=evaluation.refusals or 0.0,
            over_refusals=_over_refusals(evaluation),
            cost=cost / self.baseline_cost,
            allowed=max(MAX_OVER_REFUSALS, _over_refusals(self.baseline)),
        )

    def evaluations(self, prompts: Prompts, *locks: tuple[Lock, float]) -> list[Evaluation]:
        """The evaluation of the model as it is now, and one for each lock at a strength."""
        options: dict[str, Any] = {"judge": self.judge, "new_tokens": self.new_tokens, "batch_size": self.batch_size}
        return evaluate(self.model, self.tokenizer, prompts, locks, **options)

    def _cost(self, evaluation: Evaluation) -> float:
        """The cost of the model as it is now; NaN, which compares with nothing and Optuna refuses, becomes infinite."""
        cost = self.cost(self.model, self.tokenizer) if self.cost else evaluation.perplexity
        if cost is None or cost <= 0:
            raise FastlockError(f"the model's cost is {cost}; it must be a number above 0.")
        return math.inf if math.isnan(cost) else cost

    def _evaluation(self) -> Evaluation:
        return self.evaluations(self.prompts)[0]


def _over_refusals(evaluation: Evaluation) -> float:
    """The over-refusals; all, if the judge has no verdict on any answer: then nothing speaks for the lock."""
    return 1.0 if evaluation.over_refusals is None else evaluation.over_refusals
