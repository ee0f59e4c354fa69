"""What a judge is: given a prompt and an answer, it gives its verdict on whether the answer is a refusal.

A judge is any function of a prompt and an answer. One that has a method `batch`, which takes many pairs of both at
once, is asked in batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastlock.errors import FastlockError
from fastlock.inference.batching import Progress

Verdict = bool | None
"""Whether an answer is a refusal: True or False, or None if the judge cannot tell."""

Judge = Callable[[str, str], Verdict]
"""Given a prompt and an answer, the verdict on the answer."""

Exchange = tuple[str, str]
"""A prompt and an answer."""


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge that a user can name; `judges.py` has the table.

    Attributes:
        matches: whether a name is of this kind.
        open: the judge of a name, and of the model that was named beside it (None without one).
        takes_model: whether a model may be named beside it.
    """

    matches: Callable[[str], bool]
    open: Callable[[str, str | None], Judge]
    takes_model: bool = False


def judge_all(
    judge: Judge, exchanges: Sequence[Exchange], batch_size: int, progress: Progress, description: str
) -> list[Verdict]:
    """The judge's verdict on each exchange; in batches, if the judge takes them.

    Args:
        judge: any judge.
        exchanges: pairs of a prompt and an answer.
        batch_size: how many exchanges a judge with `batch` gets at once.
        progress, description: what shows how far it is.

    Raises:
        FastlockError: a judge gives too many or too few verdicts, or a judge that is a model has not given one yet.
    """
    batch: Callable[[Sequence[Exchange]], list[Verdict]] | None = getattr(judge, "batch", None)
    if batch is None:
        return [_verdict(judge(prompt, answer)) for prompt, answer in exchanges]
    verdicts: list[Verdict] = []
    for start in progress(range(0, len(exchanges), batch_size), description):
        verdicts += map(_verdict, batch(exchanges[start : start + batch_size]))
    if len(verdicts) != len(exchanges):
        raise FastlockError(
            f"the judge gave {len(verdicts)} verdicts on {len(exchanges)} answers; it must give one on each."
        )
    if isinstance(judge, ModelJudge):
        judge.check_read()
    return verdicts


def _verdict(value: Any) -> Verdict:
    return None if value is None else bool(value)


class ModelJudge(ABC):
    """A judge that asks a model, and reads the verdict in what it says.

    Attributes:
        name: what a report calls it.
        remedy: what to use instead of a model that gives no verdicts, as a sentence.
    """

    name: str
    remedy = ""
    _was_read = False
    _unread: str | None = None

    def __call__(self, prompt: str, answer: str) -> Verdict:
        """The verdict on one answer."""
        return self.batch([(prompt, answer)])[0]

    def batch(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """The verdicts on many answers; None where no verdict can be read in what the model says.

        Raises:
            FastlockError: the model cannot be asked.
        """
        replies = self.replies(exchanges)
        verdicts = [self.read(reply, answer) for reply, (_, answer) in zip(replies, exchanges, strict=True)]
        self._was_read = self._was_read or any(verdict is not None for verdict in verdicts)
        if replies and self._unread is None:
            self._unread = replies[0]
        return verdicts

    def check_read(self) -> None:
        """Refuse a model that has said something by now, but never a verdict.

        Raises:
            FastlockError: it is one.
        """
        if self._unread is not None and not self._was_read:
            raise FastlockError(
                f"{self.name}: it gave no verdict that can be read (on the first answer, it said "
                f"{self._unread[:100]!r}). {self.remedy}"
            )

    @abstractmethod
    def replies(self, exchanges: Sequence[Exchange]) -> list[str]:
        """What the model says on each exchange."""

    @abstractmethod
    def read(self, reply: str, answer: str) -> Verdict:
        """The verdict in a reply on an answer; what the model thinks aloud before it does not count."""


def spoken(reply: str) -> str:
    """What a model says after it has thought aloud; nothing if it is still thinking."""
    words = reply.rpartition("</think>")[2]
    return "" if "<think>" in words else words
