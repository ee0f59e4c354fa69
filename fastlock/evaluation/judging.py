"""What a judge is: it takes a prompt and an answer, and says whether the answer is a refusal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from fastlock.errors import FastlockError
from fastlock.inference.batching import Progress

Judge = Callable[[str, str], bool | None]
"""Of a prompt and an answer: True if that is a refusal, False if not, None if the judge can't say."""

Exchange = tuple[str, str]


def judge_all(
    judge: Judge, pairs: Sequence[Exchange], batch_size: int, progress: Progress, what: str
) -> list[bool | None]:
    """The judge's verdicts on pairs of a prompt and an answer; in batches, if the judge takes them.

    Raises:
        FastlockError: there is not a verdict for each pair, or a model has yet to give its first one.
    """
    batch: Callable[[Sequence[Exchange]], list[bool | None]] | None = getattr(judge, "batch", None)
    if batch is None:
        return [_verdict(judge(prompt, answer)) for prompt, answer in pairs]
    found: list[bool | None] = []
    for start in progress(range(0, len(pairs), batch_size), what):
        found += map(_verdict, batch(pairs[start : start + batch_size]))
    if len(found) != len(pairs):
        raise FastlockError(f"the judge gave {len(found)} verdicts on {len(pairs)} answers; it must give one on each.")
    if isinstance(judge, ModelJudge):
        judge.check_read()
    return found


def _verdict(given: Any) -> bool | None:
    return None if given is None else bool(given)


class ModelJudge(ABC):
    """A judge that asks a model, and reads the verdict in what it says.

    Attributes:
        name: what a report calls it.
    """

    name: str
    _was_read = False
    _unread: str | None = None

    def __call__(self, prompt: str, answer: str) -> bool | None:
        """The verdict on one answer."""
        return self.batch([(prompt, answer)])[0]

    def batch(self, pairs: Sequence[Exchange]) -> list[bool | None]:
        """The verdicts on many; None where what the model says is none.

        Raises:
            FastlockError: the model can't be asked.
        """
        replies = self.replies(pairs)
        found = [self.read(reply, answer) for reply, (_, answer) in zip(replies, pairs, strict=True)]
        self._was_read = self._was_read or any(verdict is not None for verdict in found)
        if replies and self._unread is None:
            self._unread = replies[0]
        return found

    def check_read(self) -> None:
        """Raise a FastlockError if nothing of what the model said so far was a verdict."""
        if self._unread is not None and not self._was_read:
            raise FastlockError(
                f"{self.name}: what it says is no verdict ({self._unread[:100]!r} on the first answer). {self.wanted}"
            )

    wanted = ""
    """What to use instead of a model that gives no verdicts."""

    @abstractmethod
    def replies(self, pairs: Sequence[Exchange]) -> list[str]:
        """What the model says on each pair."""

    @abstractmethod
    def read(self, reply: str, answer: str) -> bool | None:
        """The verdict in a reply; what the model thinks aloud before it is none."""


def spoken(reply: str) -> str:
    """What a model says after it thought aloud; nothing, if it is thinking still."""
    said = reply.rpartition("</think>")[2]
    return "" if "<think>" in said else said
