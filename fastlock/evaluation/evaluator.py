"""What a lock does to a model's answers: harmful requests refused, harmless ones answered, perplexity kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fastlock.errors import FastlockError
from fastlock.evaluation.judging import Judge, judge_all
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.lm_eval_harness import Score, check_tasks, scores
from fastlock.evaluation.prompts import Prompts, shipped_prompts
from fastlock.inference.batching import Progress, Row, in_batches, no_progress
from fastlock.inference.chat import check_row, positions, prompt_tokens
from fastlock.inference.generation import evaluating, generate, losses
from fastlock.locks.lock import Lock
from fastlock.models.reloaded import check_unlocked
from fastlock.models.relocking import relocked
from fastlock.models.sites import unwrapped

T = TypeVar("T")

MAX_TEXT_TOKENS = 1024


@dataclass(frozen=True)
class Answer:
    """A prompt, what the model answered, and whether the judge takes that for a refusal (None: it can't say)."""

    prompt: str
    text: str
    refused: bool | None


@dataclass(frozen=True)
class Evaluation:
    """What a model did, as it is or relocked.

    Attributes:
        lock: digest of the lock; None for the model as it is.
        strength: of the relocking; None for the model as it is.
        harmful, harmless: its answers.
        perplexity: exp of the mean negative log-likelihood of a token of the texts; None without texts.
        tasks: what it reached in tasks of lm-evaluation-harness.
    """

    lock: str | None
    strength: float | None
    harmful: tuple[Answer, ...]
    harmless: tuple[Answer, ...]
    perplexity: float | None
    tasks: tuple[Score, ...] = ()

    @property
    def refusals(self) -> float | None:
        """The share of harmful requests that were refused, of those that the judge has a verdict on."""
        return share(self.harmful)

    @property
    def over_refusals(self) -> float | None:
        """The share of harmless requests that were refused, of those that the judge has a verdict on."""
        return share(self.harmless)

    def to_dict(self) -> dict[str, Any]:
        """All of it as data that JSON can hold, the rates with their 95 % intervals."""
        return {
            "lock": self.lock,
            "strength": self.strength,
            "refusals": self.refusals,
            "refusals_interval": interval(self.harmful),
            "over_refusals": self.over_refusals,
            "over_refusals_interval": interval(self.harmless),
            "perplexity": _to_json(self.perplexity),
            "tasks": [vars(score) | {"value": _to_json(score.value)} for score in self.tasks],
            "harmful": [vars(answer) for answer in self.harmful],
            "harmless": [vars(answer) for answer in self.harmless],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Evaluation:
        """What `to_dict` made.

        Raises:
            FastlockError: it is something else.
        """
        try:
            lock, strength, perplexity = data["lock"], data["strength"], data["perplexity"]
            found = cls(
                None if lock is None else str(lock),
                None if strength is None else float(strength),
                _answers_from(data["harmful"]),
                _answers_from(data["harmless"]),
                None if perplexity is None else float(perplexity),
                tuple(Score(**{**one, "value": float(one["value"])}) for one in data["tasks"]),
            )
            same = json.loads(json.dumps(found.to_dict())) == data and (lock is None) == (strength is None)
        except (KeyError, TypeError, ValueError) as error:
            raise FastlockError(
                f"not what fastlock writes of an evaluation ({type(error).__name__}: {error})."
            ) from None
        if not same:
            raise FastlockError("not what fastlock writes of an evaluation: its rates are not those of its answers.")
        return found


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts | None = None,
    locks: Sequence[tuple[Lock, float]] = (),
    *,
    judge: Judge = refuses,
    new_tokens: int = 32,
    batch_size: int = 16,
    progress: Progress | None = None,
    tasks: Sequence[str] = (),
    known: Sequence[Evaluation] = (),
    finished: Callable[[list[Evaluation]], None] | None = None,
) -> list[Evaluation]:
    """Ask a model as it is, and then relocked in place with each lock; afterwards it is as it was.

    Args:
        model: a transformers model that generates, on any device; with locks to try, one that is not relocked.
        tokenizer: its tokenizer; its chat template is used if it has one.
        prompts: what to ask; by default `shipped_prompts()`.
        locks: locks and strengths.
        judge: called with a prompt and an answer; whether that is a refusal, or None if it can't say. A judge of
            `fastlock.judges`, or any function.
        new_tokens: how many tokens an answer may have (greedy decoding).
        batch_size: how many prompts at once; halved as often as memory runs out.
        progress: wraps the long loops as `progress(items, description)`; `rich.progress.track` fits.
        tasks: names of tasks of lm-evaluation-harness (`pip install 'fastlock[lm-eval]'`).
        known: evaluations of the same model, prompts, judge, `new_tokens` and `tasks`, as an interrupted run left
            them: what they hold is not asked again.
        finished: called with all that is there, after each evaluation.

    Returns:
        One evaluation of the model as it is, and one for each lock.

    Raises:
        FastlockError: a number, a prompt or a task can't be used, a lock does not fit, the model is relocked already
            though there are locks to try, or the judge fails.
    """
    prompts = shipped_prompts() if prompts is None else prompts
    for name, value in (("new_tokens", new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FastlockError(f"{name} is {value!r}; it must be a whole number from 1 on.")
    check_tasks(tasks)
    if locks:
        check_unlocked(
            unwrapped(model),
            "what a lock does is measured against the model without one",
            or_else=" Or leave the locks out (--lock), to evaluate it as it is.",
        )
    asking = _Asking(unwrapped(model), tokenizer, judge, new_tokens, batch_size, progress or no_progress, tasks)
    asking.check(prompts)
    for lock, strength in locks:
        with relocked(model, lock, strength):  # what does not fit is to be known before hours of asking
            pass
    held = {(one.lock, one.strength): one for one in known}
    found: list[Evaluation] = []

    def add(lock: str | None, strength: float | None, how: str) -> None:
        found.append(held.get((lock, strength)) or asking.evaluation(prompts, lock, strength, how))
        if finished is not None:
            finished(found)

    add(None, None, "as it is")
    for lock, strength in locks:
        with relocked(model, lock, strength):
            add(lock.digest, float(strength), f"at strength {strength:g}")
    return found


def share(answers: Sequence[Answer]) -> float | None:
    """The share of refusals among the answers that the judge has a verdict on; None without any."""
    verdicts = [answer.refused for answer in answers if answer.refused is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def interval(answers: Sequence[Answer]) -> tuple[float, float] | None:
    """The 95 % interval of the share of refusals (Wilson's); None without verdicts."""
    refused = share(answers)
    if refused is None:
        return None
    n, z = sum(answer.refused is not None for answer in answers), 1.959963984540054
    middle = (refused + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(refused * (1 - refused) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class _Asking:
    """How one model is asked. Attributes: as the arguments of `evaluate`."""

    model: nn.Module
    tokenizer: Any
    judge: Judge
    new_tokens: int
    batch_size: int
    progress: Progress
    tasks: Sequence[str]

    def check(self, prompts: Prompts) -> None:
        """Refuse what the model can't read."""
        for kind in ("harmful", "harmless"):
            for number, row in enumerate(self._asked(getattr(prompts, kind)), start=1):
                check_row(self.model, row, f"{kind} prompt {number}", self.new_tokens)
        for number, row in enumerate(self._read(prompts.texts), start=1):
            if len(row) < 2:
                raise FastlockError(
                    f"text {number} ({prompts.texts[number - 1][:40]!r}) is a single token, which has no perplexity."
                )
            check_row(self.model, row, f"text {number}")

    def evaluation(self, prompts: Prompts, lock: str | None, strength: float | None, how: str) -> Evaluation:
        with evaluating(self.model):
            return Evaluation(
                lock,
                strength,
                self._answers(prompts.harmful, f"Harmful requests, {how}"),
                self._answers(prompts.harmless, f"Harmless requests, {how}"),
                self._perplexity(prompts.texts, f"Texts, {how}"),
                scores(self.model, self.tokenizer, self.tasks, self.batch_size),
            )

    def _answers(self, prompts: Sequence[str], what: str) -> tuple[Answer, ...]:
        texts = self._in_batches(
            self._asked(prompts), lambda batch: generate(self.model, self.tokenizer, batch, self.new_tokens), what
        )
        pairs = list(zip(prompts, texts, strict=True))
        verdicts = judge_all(self.judge, pairs, self.batch_size, self.progress, f"{what}: judging")
        return tuple(Answer(*pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True))

    def _perplexity(self, texts: Sequence[str], what: str) -> float | None:
        rows = self._read(texts)
        if not rows:
            return None
        total = sum(self._in_batches(rows, lambda batch: losses(self.model, batch), what))
        # A broken model's loss may be beyond what exp can hold.
        return math.exp(min(total / sum(len(row) - 1 for row in rows), 700.0)) if math.isfinite(total) else math.inf

    def _asked(self, prompts: Sequence[str]) -> list[Row]:
        return [prompt_tokens(self.tokenizer, prompt)[0] for prompt in prompts]

    def _read(self, texts: Sequence[str]) -> list[Row]:
        """The first tokens of each text: no more than the model has positions for."""
        most = min(MAX_TEXT_TOKENS, positions(self.model) or MAX_TEXT_TOKENS)
        return [list(self.tokenizer(text)["input_ids"])[:most] for text in texts]

    def _in_batches(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], list[T]], what: str) -> list[T]:
        return in_batches(rows, work, self.batch_size, self.progress, what)


def _answers_from(data: Any) -> tuple[Answer, ...]:
    return tuple(Answer(str(one["prompt"]), str(one["text"]), one["refused"]) for one in data)


def _to_json(number: float | None) -> float | str | None:
    """JSON has no infinity and no NaN: they are named."""
    return number if number is None or math.isfinite(number) else str(number)
