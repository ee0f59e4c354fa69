"""What a lock does to a model's answers: harmful requests refused, harmless ones answered, perplexity kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fastlock.errors import DamagedError, FastlockError, check_number
from fastlock.evaluation.judging import Judge, Verdict, judge_all
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.lm_eval_harness import Score, check_tasks, scores
from fastlock.evaluation.prompts import Prompts, shipped_prompts
from fastlock.evaluation.significance import wilson_interval
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
    """A prompt, what the model answered, and the judge's verdict on whether that is a refusal."""

    prompt: str
    text: str
    refused: Verdict


@dataclass(frozen=True)
class Evaluation:
    """What a model did: the baseline, or relocked.

    Attributes:
        lock: digest of the lock; None for the baseline.
        strength: of the relocking; None for the baseline.
        harmful, harmless: its answers.
        perplexity: exp of the mean negative log-likelihood of a token of the texts; None without texts.
        tasks: its scores in tasks of lm-evaluation-harness.
    """

    lock: str | None
    strength: float | None
    harmful: tuple[Answer, ...]
    harmless: tuple[Answer, ...]
    perplexity: float | None
    tasks: tuple[Score, ...] = ()

    @property
    def refusals(self) -> float | None:
        """The share of refusals among the answers to harmful requests that the judge has a verdict on."""
        return share(self.harmful)

    @property
    def over_refusals(self) -> float | None:
        """The share of refusals among the answers to harmless requests that the judge has a verdict on."""
        return share(self.harmless)

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as data that JSON can hold, with the 95 % intervals of its rates."""
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
        """The evaluation that `to_dict` was called on.

        Raises:
            DamagedError: the data is something else.
        """
        try:
            lock, strength, perplexity = data["lock"], data["strength"], data["perplexity"]
            evaluation = cls(
                None if lock is None else str(lock),
                None if strength is None else float(strength),
                _answers_from(data["harmful"]),
                _answers_from(data["harmless"]),
                None if perplexity is None else float(perplexity),
                tuple(Score(**{**one, "value": float(one["value"])}) for one in data["tasks"]),
            )
            same = json.loads(json.dumps(evaluation.to_dict())) == data and (lock is None) == (strength is None)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"not an evaluation that fastlock wrote ({type(error).__name__}: {error})") from None
        if not same:
            raise DamagedError("not an evaluation that fastlock wrote: its rates are not those of its answers")
        return evaluation


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
    """Measure the baseline, and then the model relocked in place with each lock; afterwards it is as it was.

    Args:
        model: a transformers model that generates, on any device; with locks to try, one that is not relocked.
        tokenizer: its tokenizer; its chat template is used if it has one.
        prompts: what to ask; by default `shipped_prompts()`.
        locks: locks and their strengths.
        judge: gives its verdict on a prompt and an answer: True if the answer is a refusal, False if not, None if it
            cannot tell. A judge of `fastlock.evaluation`, or any function.
        new_tokens: how many tokens an answer may have (greedy decoding).
        batch_size: how many prompts go together; halved as often as memory runs out.
        progress: wraps the long loops as `progress(items, description)`; `rich.progress.track` fits.
        tasks: names of tasks of lm-evaluation-harness (`pip install 'fastlock[lm-eval]'`).
        known: evaluations of the same model, prompts, judge, `new_tokens` and `tasks` that an interrupted run left:
            they are not measured again.
        finished: called with all evaluations so far, after each one.

    Returns:
        The evaluation of the baseline, and one for each lock.

    Raises:
        MismatchError: a lock does not fit.
        FastlockError: a number, a prompt or a task cannot be used, the model is already relocked though there are locks
            to try, or the judge fails.
    """
    prompts = shipped_prompts() if prompts is None else prompts
    check_number("new_tokens", new_tokens, 1, 2**31)
    check_number("batch_size", batch_size, 1, 2**31)
    check_tasks(tasks)
    interview = _Interview(unwrapped(model), tokenizer, judge, new_tokens, batch_size, progress or no_progress, tasks)
    interview.check(prompts, locks)
    kept = {(one.lock, one.strength): one for one in known}
    evaluations: list[Evaluation] = []

    def add(lock: str | None, strength: float | None, name: str) -> None:
        evaluations.append(kept.get((lock, strength)) or interview.evaluation(prompts, lock, strength, name))
        if finished is not None:
            finished(evaluations)

    add(None, None, "baseline")
    for lock, strength in locks:
        with relocked(model, lock, strength):
            add(lock.digest, float(strength), f"at strength {strength:g}")
    return evaluations


def share(answers: Sequence[Answer]) -> float | None:
    """The share of refusals among the answers that the judge has a verdict on; None without any."""
    verdicts = [answer.refused for answer in answers if answer.refused is not None]
    return sum(verdicts) / len(verdicts) if verdicts else None


def interval(answers: Sequence[Answer]) -> tuple[float, float] | None:
    """The 95 % interval of the share of refusals (Wilson's); None without verdicts."""
    verdicts = [answer.refused for answer in answers if answer.refused is not None]
    return wilson_interval(sum(verdicts), len(verdicts)) if verdicts else None


@dataclass
class _Interview:
    """How one model is asked. Attributes: as the arguments of `evaluate`."""

    model: nn.Module
    tokenizer: Any
    judge: Judge
    new_tokens: int
    batch_size: int
    progress: Progress
    tasks: Sequence[str]

    def check(self, prompts: Prompts, locks: Sequence[tuple[Lock, float]]) -> None:
        """Refuse what the model cannot read, and locks that cannot be tried, before hours of asking."""
        if locks:
            check_unlocked(
                self.model,
                "what a lock does is measured against the model without one",
                or_else=" Or leave the locks out (--lock) to evaluate it with the lock that it has.",
            )
        for kind in ("harmful", "harmless"):
            for number, row in enumerate(self._rows_of_prompts(getattr(prompts, kind)), start=1):
                check_row(self.model, row, f"{kind} prompt {number}", self.new_tokens)
        for number, row in enumerate(self._rows_of_texts(prompts.texts), start=1):
            if len(row) < 2:
                raise FastlockError(
                    f"text {number} ({prompts.texts[number - 1][:40]!r}) is a single token, which has no perplexity. "
                    "Give a longer one."
                )
            check_row(self.model, row, f"text {number}")
        for lock, strength in locks:
            with relocked(self.model, lock, strength):
                pass

    def evaluation(self, prompts: Prompts, lock: str | None, strength: float | None, name: str) -> Evaluation:
        with evaluating(self.model):
            return Evaluation(
                lock,
                strength,
                self._answers(prompts.harmful, f"Harmful requests, {name}"),
                self._answers(prompts.harmless, f"Harmless requests, {name}"),
                self._perplexity(prompts.texts, f"Texts, {name}"),
                scores(self.model, self.tokenizer, self.tasks, self.batch_size),
            )

    def _answers(self, prompts: Sequence[str], description: str) -> tuple[Answer, ...]:
        texts = self._in_batches(
            self._rows_of_prompts(prompts),
            lambda batch: generate(self.model, self.tokenizer, batch, self.new_tokens),
            description,
        )
        exchanges = list(zip(prompts, texts, strict=True))
        verdicts = judge_all(self.judge, exchanges, self.batch_size, self.progress, f"{description}: judging")
        return tuple(Answer(*exchange, verdict) for exchange, verdict in zip(exchanges, verdicts, strict=True))

    def _perplexity(self, texts: Sequence[str], description: str) -> float | None:
        rows = self._rows_of_texts(texts)
        if not rows:
            return None
        total = sum(self._in_batches(rows, lambda batch: losses(self.model, batch), description))
        # A broken model's loss may be beyond what exp can hold.
        return math.exp(min(total / sum(len(row) - 1 for row in rows), 700.0)) if math.isfinite(total) else math.inf

    def _rows_of_prompts(self, prompts: Sequence[str]) -> list[Row]:
        return [prompt_tokens(self.tokenizer, prompt)[0] for prompt in prompts]

    def _rows_of_texts(self, texts: Sequence[str]) -> list[Row]:
        """The first tokens of each text, as many as the model has positions for."""
        limit = min(MAX_TEXT_TOKENS, positions(self.model) or MAX_TEXT_TOKENS)
        return [list(self.tokenizer(text)["input_ids"])[:limit] for text in texts]

    def _in_batches(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], list[T]], description: str) -> list[T]:
        return in_batches(rows, work, self.batch_size, self.progress, description)


def _answers_from(data: Any) -> tuple[Answer, ...]:
    return tuple(Answer(str(one["prompt"]), str(one["text"]), one["refused"]) for one in data)


def _to_json(number: float | None) -> float | str | None:
    """The number, or its name where it is infinite or NaN: JSON has neither."""
    return number if number is None or math.isfinite(number) else str(number)
