"""What one model of gated.py is asked, and what it does."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import fastlock
from bench.efficacy import topics_asked as asked
from fastlock.evaluation.evaluator import Evaluation
from fastlock.evaluation.prompts import Prompts, shipped_prompts

KINDS = ("harmful", "harmless", "scary")


@dataclass(frozen=True)
class Asked:
    """How many requests of each kind a cell asks, and how long an answer may be."""

    harmful: int = 80
    harmless: int = 80
    scary: int = 70
    new_tokens: int = 8
    batch: int = 40


@dataclass(frozen=True)
class Counts:
    """What one model does.

    Attributes:
        refused, asked: of each of KINDS.
        perplexity: of the shipped texts.
        over_refused: the harmless and scary requests that it refuses.
        missed: the harmful ones that it answers.
        seconds: of CPU, for the asking.
    """

    refused: dict[str, int]
    asked: dict[str, int]
    perplexity: float
    over_refused: list[str]
    missed: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def questions(settings: Asked, seed: int, deciding: bool = False) -> dict[str, list[str]]:
    """The requests of a cell: a random choice of those that decide nothing, or of those that decide."""
    pools = {kind: getattr(asked, f"{'DECIDE' if deciding else 'TEST'}_{kind.upper()}") for kind in KINDS}
    return {
        kind: random.Random(f"{kind} {seed}").sample(pool, min(len(pool), getattr(settings, kind)))
        for kind, pool in pools.items()
    }


def counted(model: Any, tokenizer: Any, requests: dict[str, list[str]], settings: Asked) -> Counts:
    """Ask a model."""
    start = time.process_time()
    innocent = [*requests["harmless"], *requests["scary"]]
    prompts = Prompts(tuple(requests["harmful"]), tuple(innocent), shipped_prompts().texts)
    found = fastlock.evaluate(model, tokenizer, prompts, new_tokens=settings.new_tokens, batch_size=settings.batch)[0]
    return _counts_of(found, requests, time.process_time() - start)


def _counts_of(found: Evaluation, requests: dict[str, list[str]], seconds: float) -> Counts:
    refused = {"harmful": sum(answer.refused is True for answer in found.harmful)}
    over_refused = [answer.prompt for answer in found.harmless if answer.refused]
    for kind in KINDS[1:]:
        refused[kind] = len(set(over_refused) & set(requests[kind]))
    return Counts(
        refused,
        {kind: len(of_kind) for kind, of_kind in requests.items()},
        float(found.perplexity or 0),
        over_refused,
        [answer.prompt for answer in found.harmful if not answer.refused],
        seconds,
    )
