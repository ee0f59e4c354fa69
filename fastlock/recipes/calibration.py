"""Finding the lock: the recipe, the number of heads and the strength with the best trade of three measured things.

Harmful requests should be refused, harmless ones answered, and the perplexity of ordinary text should stay as it was.
A fold costs microseconds, so every trial is measured on the relocked model itself; the search is Optuna's
(multi-objective TPE).

For a given lock, only the strength is searched, by a sweep that refines around the best. It begins with strength 0, the
baseline: a model that has kept its refusals needs no lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastlock.errors import FastlockError, check_number
from fastlock.evaluation.evaluator import Evaluation
from fastlock.evaluation.judges import judge_name
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import Prompts, prompts_digest, shipped_prompts
from fastlock.inference.batching import Progress, no_progress
from fastlock.locks.lock import Lock, check_lock
from fastlock.models.reloaded import check_unlocked
from fastlock.models.relocking import relocked
from fastlock.models.sites import unwrapped
from fastlock.recipes.bases import check_base, identity
from fastlock.recipes.measuring import Cost, Measuring
from fastlock.recipes.pairs import Pair
from fastlock.recipes.search_journal import keeping, measured_trials, sampler_for, study_of
from fastlock.recipes.searches import LockSearch, Search, StrengthSearch
from fastlock.recipes.trials import KEPT, Trial, frontier

_WITHOUT = "a lock is made from, and measured against, a model without one"


@dataclass(frozen=True)
class Calibration:
    """What was tried, and what was chosen.

    Attributes:
        lock: the chosen lock, with its strength, and what was measured in its metadata; None if a given lock is best at
            strength 0.
        chosen: its trial.
        trials: all trials, in order.
        before, after: the baseline and the model with the chosen lock, on held-out requests; twice the same evaluation
            if there is no lock.
    """

    lock: Lock | None
    chosen: Trial
    trials: tuple[Trial, ...]
    before: Evaluation
    after: Evaluation

    @property
    def frontier(self) -> tuple[Trial, ...]:
        """The trials that no other beats, those with most refusals first."""
        return frontier(self.trials)

    @property
    def held_out(self) -> tuple[Evaluation, ...]:
        """The evaluations on held-out requests: `before`, and `after` if there is a lock."""
        return (self.before,) if self.lock is None else (self.before, self.after)

    @property
    def why_no_lock(self) -> str | None:
        """Why no strength of a given lock was chosen, as sentences; None if one was."""
        if self.lock is not None:
            return None
        verdict = "needs no lock" if self.chosen.refusals >= KEPT else "is not helped by this lock"
        return (
            f"This checkpoint {verdict}: without one, it refuses {self.chosen.refusals:.0%} of the harmful requests "
            f"that decided, and {self.chosen.over_refusals:.0%} of the harmless ones. No strength that was tried does "
            "better for what it costs, and lower perplexity alone is no reason for a lock."
        )

    def to_dict(self) -> dict[str, Any]:
        """The calibration as data that JSON can hold."""
        return {
            "lock": self.lock.digest if self.lock else None,
            "why_no_lock": self.why_no_lock,
            "chosen": self.chosen.to_dict(),
            "frontier": [trial.to_dict() for trial in self.frontier],
            "trials": [trial.to_dict() for trial in self.trials],
            "held_out": [evaluation.to_dict() for evaluation in self.held_out],
        }


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, str]] | None = None,
    *,
    base: nn.Module | None = None,
    lock: Lock | None = None,
    harmless: Iterable[str] | None = None,
    prompts: Prompts | None = None,
    held_out: Prompts | None = None,
    trials: int | None = None,
    cost: Cost | None = None,
    judge: Judge = refuses,
    new_tokens: int = 16,
    batch_size: int = 32,
    seed: int = 42,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the lock of a base, or the strength of a given lock, that serves a model best: relocked in place, measured.

    Of the trials that make the model refuse at most 2 % of harmless requests (or what it refuses without a lock) and
    raise its perplexity by at most 3 %, the one that refuses most harmful requests is chosen. If there is none, the
    best compromise is (see `best`).

    Args:
        model: a transformers model whose refusals should come back: a fine-tune, or the base itself. It is left as it
            was.
        tokenizer: its tokenizer.
        pairs, harmless: what locks are extracted from, see `fastlock.extract`; by default the shipped ones.
        base: the aligned base that locks are extracted from; by default `model`.
        lock: a lock to use instead of all these; only its strength is searched, strength 0 included.
        prompts: what decides; by default the shipped prompts. Both harmful and harmless requests are needed. Without
            texts, the perplexity is that of the shipped ones.
        held_out: what the chosen lock is reported on, and decides nothing; by default one half of `prompts`, drawn with
            the seed, and only the other half decides.
        trials: how many locks or strengths are tried; by default 60 locks, or 20 strengths.
        cost: what a lock may raise by 3 %, instead of the perplexity of the texts: a function of the model and the
            tokenizer that gives a positive number, or NaN if a lock has broken the model.
        judge, new_tokens, batch_size: see `fastlock.evaluate`.
        seed: decides the halves, the search and the extraction. The same inputs on the same machine give the same lock.
        journal: a file that keeps the trials: a run that was stopped resumes there, and tries what it would have tried
            without the stop. Its directory is made.
        progress: wraps the loop over the trials, and those of extraction, as `progress(items, description)`.

    Returns:
        The lock, with its strength, and every trial. There is no lock if a given one is best at strength 0.

    Raises:
        MismatchError: the base is of another geometry, or the given lock does not fit.
        DamagedError: the journal is damaged.
        FastlockError: prompts are missing, Optuna is not installed, a number cannot be used, the model or the base is
            relocked, both a lock and what locks are made from are given, the journal cannot be written or is of another
            search; or, with its kinds, as for `fastlock.extract` and `fastlock.relock`.
    """
    check_number("trials", 1 if trials is None else trials, 1, 2**31)
    check_number("seed", seed, 0, 2**32 - 1)
    check_unlocked(unwrapped(model), _WITHOUT)
    deciding, reported = _divided(_with_texts(prompts or shipped_prompts(), cost), held_out, seed)
    measuring = Measuring(model, tokenizer, deciding, cost, judge, new_tokens, batch_size)
    search: Search
    if lock is None:
        base = model if base is None else base
        check_unlocked(unwrapped(base), _WITHOUT)
        check_base(model, base)
        search = LockSearch(base, tokenizer, pairs, harmless, seed, progress)
    else:
        search = _strength_search(model, lock, {"base": base, "pairs": pairs, "harmless": harmless})
    tried = _tried(search, measuring, trials or search.trials, seed, journal, progress or no_progress)
    return _calibration(search, tried, measuring, reported)


def _tried(
    search: Search, measuring: Measuring, trials: int, seed: int, journal: Path | None, progress: Progress
) -> tuple[Trial, ...]:
    """So many trials of a search, those in the journal included."""
    cost = measuring.cost
    facts = {
        "model": identity(measuring.model),
        **search.facts,
        "set of prompts": prompts_digest(measuring.prompts),
        "length of answers": measuring.new_tokens,
        "judge": judge_name(measuring.judge),
        "cost": "perplexity" if cost is None else getattr(cost, "__qualname__", type(cost).__qualname__),
        "seed": seed,
    }
    study = study_of(journal, facts)
    for _ in progress(range(max(0, trials - len(measured_trials(study)))), search.description):
        _try(study, search, measuring, seed, journal)
    return measured_trials(study)


def _try(study: Any, search: Search, measuring: Measuring, seed: int, journal: Path | None) -> None:
    """One trial of a search; the study keeps all of it."""
    with keeping(journal):
        study.sampler = sampler_for(seed, len(measured_trials(study)))
        asked = study.ask()
        candidate = search.suggestion(asked)
    trial = Trial.of(candidate, measuring.measure(search.lock(candidate), candidate.strength))
    with keeping(journal):
        asked.set_user_attr("trial", vars(trial))
        study.tell(asked, (trial.refusals, trial.over_refusals, trial.cost))


def _calibration(search: Search, tried: tuple[Trial, ...], measuring: Measuring, held_out: Prompts) -> Calibration:
    """The best of the trials, measured on held-out requests."""
    chosen = search.best(tried)
    if chosen.strength == 0:
        (baseline,) = measuring.evaluations(held_out)
        return Calibration(None, chosen, tried, baseline, baseline)
    lock = search.lock(chosen)
    before, after = measuring.evaluations(held_out, (lock, chosen.strength))
    measured = chosen.to_dict() | {"trials": len(tried), "held_out": _rates(after), "held_out_before": _rates(before)}
    lock = replace(lock, strength=chosen.strength, calibration=json.dumps(measured, sort_keys=True))
    return Calibration(lock, chosen, tried, before, after)


def _rates(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation without its answers."""
    return {key: value for key, value in evaluation.to_dict().items() if key not in ("harmful", "harmless", "lock")}


def _strength_search(model: nn.Module, lock: Lock, others: Mapping[str, Any]) -> StrengthSearch:
    """Refuse a lock that does not fit, or that is given with something else, before anything is asked or written."""
    if superfluous := [name for name, value in others.items() if value is not None]:
        raise FastlockError(
            f"lock and {superfluous[0]} are both given: either the strength of this lock is searched, or locks are "
            "made from a base. Leave one of the two out."
        )
    check_lock(lock)
    search = StrengthSearch(lock)
    with relocked(model, lock, max(search.sweep)):
        pass
    return search


def _with_texts(prompts: Prompts, cost: Cost | None) -> Prompts:
    """Prompts that have texts if the cost is their perplexity."""
    return prompts if prompts.texts or cost is not None else replace(prompts, texts=shipped_prompts().texts)


def _divided(prompts: Prompts, held_out: Prompts | None, seed: int) -> tuple[Prompts, Prompts]:
    """What decides and what is held out: halves of one set, if there is only one."""
    for name, asked in (("prompts", prompts), ("held_out", held_out)):
        if asked is not None and not (asked.harmful and asked.harmless):
            raise FastlockError(f"{name}: both harmful and harmless prompts are needed to find a trade between them.")
    if held_out is not None:
        _check_apart(prompts, held_out)
        return prompts, held_out
    random = np.random.RandomState(seed)
    first, second = {}, {}
    for kind, texts in vars(prompts).items():
        distinct = list(dict.fromkeys(texts))
        if len(distinct) == 1:
            raise FastlockError(
                f"{kind}: a single one cannot both decide and be held out. Give more, or give held-out prompts."
            )
        order = random.permutation(len(distinct))
        half = -(-len(distinct) // 2)
        first[kind] = tuple(distinct[i] for i in order[:half])
        second[kind] = tuple(distinct[i] for i in order[half:])
    return Prompts(**first), Prompts(**second)


def _check_apart(prompts: Prompts, held_out: Prompts) -> None:
    """Refuse held-out requests that also decide; ordinary texts may do both, as a perplexity is no answer to learn."""
    common = {*prompts.harmful, *prompts.harmless} & {*held_out.harmful, *held_out.harmless}
    if common:
        raise FastlockError(f"{min(common)[:80]!r} both decides and is held out. Remove it from one of the two.")
