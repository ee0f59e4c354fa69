"""Finding the lock: the recipe, the number of heads and the strength with the best trade of three measured things.

Harmful requests are refused, harmless ones answered, and the perplexity of ordinary text stays as it was. A fold costs
microseconds, so every trial is measured on the relocked model itself; the search is Optuna's (multi-objective TPE).

Of a lock that is given, only the strength is searched: a sweep that refines around the best. It begins with strength 0,
the model as it is, since one that has kept its refusals needs no lock.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastlock.architectures.families import head_geometry
from fastlock.errors import FastlockError, check_number
from fastlock.evaluation.evaluator import Evaluation, evaluate
from fastlock.evaluation.judges import judge_name
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import Prompts, prompts_digest, shipped_prompts
from fastlock.inference.batching import Progress, no_progress
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import raw_bytes
from fastlock.models.reloaded import check_unlocked
from fastlock.models.relocking import relocked
from fastlock.models.sites import check_foldable, sites, text_config, unwrapped
from fastlock.recipes.extraction import Ranking, rank_heads
from fastlock.recipes.pairs import Pair, pair_from, pairs_digest, shipped_harmless, shipped_pairs
from fastlock.recipes.search_journal import keeping, measured_trials, sampler_for, study_of
from fastlock.recipes.trials import (
    KEPT,
    MAX_OVER_REFUSALS,
    STRENGTHS,
    SWEEP,
    Trial,
    best,
    best_strength,
    frontier,
    next_strength,
)
from fastlock.storage.places import files_digest

Cost = Callable[[nn.Module, Any], float]
_WITHOUT = "a lock is made of, and measured against, a model without one"

# What is searched: recipes, each with the number of tokens that it reads; the share of heads; strengths.
POSITIONS = (
    *("safetylock/1", "safetylock/5", "answer-start/1", "answer-start/5"),
    *("prompt-end/1", "prompt-end/2", "prompt-end/4"),
)
HEADS = (1 / 64, 1 / 2)
TRIALS = 60
STRENGTH_TRIALS = 20


@dataclass(frozen=True)
class Calibration:
    """What was tried, and what was chosen.

    Attributes:
        lock: the chosen lock, with its strength, and what was measured in its metadata; None if a lock that was given
            is best at strength 0.
        chosen: its trial.
        trials: all of them, in order.
        before, after: the model as it is and with the chosen lock, asked what decided nothing; one evaluation if there
            is no lock.
    """

    lock: Lock | None
    chosen: Trial
    trials: tuple[Trial, ...]
    before: Evaluation
    after: Evaluation

    @property
    def frontier(self) -> tuple[Trial, ...]:
        """The trials that no other beats, by falling refusals."""
        return frontier(self.trials)

    @property
    def held_out(self) -> tuple[Evaluation, ...]:
        """What was asked and decided nothing: `before`, and `after` if there is a lock."""
        return (self.before,) if self.lock is None else (self.before, self.after)

    @property
    def why_no_lock(self) -> str | None:
        """Why no strength of the lock that was given was chosen, as sentences; None if one was."""
        if self.lock is not None:
            return None
        what = "checkpoint needs no lock" if self.chosen.refusals >= KEPT else "checkpoint is not helped by this lock"
        return (
            f"This {what}: as it is, it refuses {self.chosen.refusals:.0%} of the harmful requests that decided and "
            f"{self.chosen.over_refusals:.0%} of the harmless ones. No strength that was tried does better at what it "
            "costs, and a lower perplexity alone is no reason for a lock."
        )

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON can hold it."""
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
    """Find the lock of a base, or the strength of a lock, that serves a model best: relocked in place and measured.

    Of the trials that make it refuse at most 2 % of harmless requests, and raise its perplexity by at most 3 %, the one
    that refuses most harmful requests is chosen. If there is none, the best compromise is (see `best`).

    Args:
        model: a transformers model whose refusals are to come back: a fine-tune, or the base itself. It is left as it
            was.
        tokenizer: its tokenizer.
        pairs, harmless: what locks are extracted from, see `fastlock.extract`; by default the shipped ones.
        base: the aligned base, from which they are; by default `model`.
        lock: instead of all these a lock, of which only the strength is searched, strength 0 included.
        prompts: what decides; by default the shipped prompts. Their harmful and harmless requests are both needed. If
            they have no texts, the perplexity is that of the shipped ones.
        held_out: what is reported of the chosen lock, and decides nothing; by default one half of `prompts`, drawn
            with the seed, and only the other half decides.
        trials: how many locks are tried, or how many strengths; by default 60, or 20 of a lock that is given.
        cost: instead of the perplexity of the texts, what a lock may raise by 3 %: a function of the model and the
            tokenizer that gives a positive number, or NaN where a lock has broken the model.
        judge, new_tokens, batch_size: see `fastlock.evaluate`.
        seed: decides the halves, the search and the extraction. The same inputs on the same machine give the same lock.
        journal: a file that keeps the trials, so that a run that was stopped goes on where it was, and tries what it
            would have tried without the stop; its directory is made.
        progress: wraps the loop over the trials, and those of extraction, as `progress(items, description)`.

    Returns:
        The lock, with its strength, and every trial. No lock if one was given that is best at strength 0.

    Raises:
        FastlockError: prompts are missing, Optuna is not installed, a number can't be used, the model or the base is
            relocked, the base is of another geometry, both a lock and what locks are made from are given, the journal
            can't be written, is damaged or of another search; or as for `fastlock.extract` and `fastlock.relock`.
    """
    if trials is None:
        trials = TRIALS if lock is None else STRENGTH_TRIALS
    check_number("trials", trials, 1, 2**31)
    check_number("seed", seed, 0, 2**32 - 1)
    check_unlocked(unwrapped(model), _WITHOUT)
    prompts = prompts or shipped_prompts()
    if not prompts.texts and cost is None:
        prompts = replace(prompts, texts=shipped_prompts().texts)
    deciding, reported = _divided(prompts, held_out, seed)
    asking = _Measuring(model, tokenizer, deciding, cost, judge, new_tokens, batch_size)
    search: _Rankings | _Strengths
    if lock is None:
        base = model if base is None else base
        _check_base(model, base)
        search = _Rankings(base, tokenizer, pairs, harmless, seed, progress)
    else:
        _check_given(model, lock, {"base": base, "pairs": pairs, "harmless": harmless})
        search = _Strengths(lock)
    facts = {
        "model": _name(model),
        **search.facts,
        "set of prompts": prompts_digest(deciding),
        "length of answers": new_tokens,
        "judge": judge_name(judge),
        "cost": "perplexity" if cost is None else getattr(cost, "__qualname__", type(cost).__qualname__),
        "seed": seed,
    }
    study = study_of(journal, facts)
    left = max(0, trials - len(measured_trials(study)))
    for _ in (progress or no_progress)(range(left), search.doing):
        _try(study, search, asking, seed, journal)
    tried = measured_trials(study)
    chosen = search.best(tried)
    options: dict[str, Any] = {"judge": judge, "new_tokens": new_tokens, "batch_size": batch_size}
    if chosen.strength == 0:
        as_it_is = evaluate(model, tokenizer, reported, **options)[0]
        return Calibration(None, chosen, tried, as_it_is, as_it_is)
    made = search.lock(asdict(chosen))
    before, after = evaluate(model, tokenizer, reported, [(made, chosen.strength)], **options)
    measured = chosen.to_dict() | {"trials": len(tried), "held_out": _rates(after), "held_out_before": _rates(before)}
    made = replace(made, strength=chosen.strength, calibration=json.dumps(measured, sort_keys=True))
    return Calibration(made, chosen, tried, before, after)


class _Strengths:
    """The search for the strength of one lock."""

    doing = "Trying strengths"
    best = staticmethod(best_strength)

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self.facts = {"lock": lock.digest}

    def suggestion(self, trial: Any) -> dict[str, Any]:
        """The strength to try; the study only keeps it."""
        return {"recipe": None, "tokens": None, "heads": None, "strength": next_strength(measured_trials(trial.study))}

    def lock(self, _how: Mapping[str, Any]) -> Lock:
        return self._lock


class _Rankings:
    """The search for a lock: a base's heads by recipe and number of tokens, each ranked once, when first asked for."""

    doing = "Trying locks"
    best = staticmethod(best)

    def __init__(
        self,
        base: nn.Module,
        tokenizer: Any,
        pairs: Iterable[Any] | None,
        harmless: Iterable[str] | None,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._ranked: dict[tuple[str, int], Ranking] = {}
        self._base, self._tokenizer, self._seed, self._progress = base, tokenizer, seed, progress
        self._pairs = shipped_pairs() if pairs is None else tuple(pairs)
        self._harmless = shipped_harmless() if harmless is None else tuple(harmless)
        geometry = _geometry(base)
        self._num_heads = geometry["num_layers"] * geometry["num_heads"]
        read = pairs_digest([pair_from(pair, "a pair") for pair in self._pairs], self._harmless)
        self.facts = {"base": _name(base), "extraction set": read}

    def of(self, recipe: str, tokens: int) -> Ranking:
        key = (recipe, tokens)
        if key not in self._ranked:
            harmless = self._harmless if recipe == "prompt-end" else None
            self._ranked[key] = rank_heads(
                self._base,
                self._tokenizer,
                self._pairs,
                tokens,
                recipe=recipe,
                harmless=harmless,
                seed=self._seed,
                progress=self._progress,
            )
        return self._ranked[key]

    def suggestion(self, trial: Any) -> dict[str, Any]:
        """How the next lock is made, and its strength."""
        position = trial.suggest_categorical("position", POSITIONS)
        recipe, tokens = position.rsplit("/", 1)
        share = trial.suggest_float("heads", *HEADS, log=True)
        strength = trial.suggest_float("strength", *STRENGTHS, log=True)
        heads = max(1, round(share * self._num_heads))
        return {"recipe": recipe, "tokens": int(tokens), "heads": heads, "strength": strength}

    def lock(self, how: Mapping[str, Any]) -> Lock:
        return self.of(how["recipe"], how["tokens"]).lock(how["heads"])


@dataclass(frozen=True)
class _Measuring:
    """How a trial is measured. Attributes: as the arguments of `calibrate`; what the model costs without a lock."""

    model: nn.Module
    tokenizer: Any
    prompts: Prompts
    cost: Cost | None
    judge: Judge
    new_tokens: int
    batch_size: int

    @functools.cached_property
    def as_it_is(self) -> Evaluation:
        return self._evaluation()

    @functools.cached_property
    def cost_without(self) -> float:
        found = self._cost(self.as_it_is)
        if found == math.inf:
            raise FastlockError(
                "the model's cost without a lock is nan or infinite; it must be a finite number above 0."
            )
        return found

    def measure(self, lock: Lock, strength: float) -> dict[str, float]:
        """Refusals, over-refusals and cost of the relocked model; at strength 0 of the model as it is."""
        found, cost = self.as_it_is, self.cost_without
        if strength:
            with relocked(self.model, lock, strength):
                found = self._evaluation()
                cost = self._cost(found)
        return {
            "refusals": found.refusals or 0.0,
            "over_refusals": _over_refusals(found),
            "cost": cost / self.cost_without,
            "allowed": max(MAX_OVER_REFUSALS, _over_refusals(self.as_it_is)),
        }

    def _cost(self, found: Evaluation) -> float:
        """Of the model as it is now; NaN, which can't be compared and Optuna does not take, is without end."""
        cost = self.cost(self.model, self.tokenizer) if self.cost else found.perplexity
        if cost is None or cost <= 0:
            raise FastlockError(f"the model's cost is {cost}; it must be a number above 0.")
        return math.inf if math.isnan(cost) else cost

    def _evaluation(self) -> Evaluation:
        options: dict[str, Any] = {"judge": self.judge, "new_tokens": self.new_tokens, "batch_size": self.batch_size}
        return evaluate(self.model, self.tokenizer, self.prompts, **options)[0]


def _over_refusals(found: Evaluation) -> float:
    """Where the judge has no verdict on any answer to a harmless request, nothing speaks for the lock."""
    return 1.0 if found.over_refusals is None else found.over_refusals


def _try(study: Any, search: _Rankings | _Strengths, asking: _Measuring, seed: int, journal: Path | None) -> None:
    """One trial of the search; all of it is kept in the study."""
    with keeping(journal):
        study.sampler = sampler_for(seed, len(measured_trials(study)))
        trial = study.ask()
        how = search.suggestion(trial)
    done = Trial(**(how | asking.measure(search.lock(how), how["strength"])))
    with keeping(journal):
        trial.set_user_attr("trial", asdict(done))
        study.tell(trial, (done.refusals, done.over_refusals, done.cost))


def _name(model: nn.Module) -> str:
    """What tells a model from others: its name, some of its weights, and the state of its files where they are here."""
    config: Any = unwrapped(model).config
    name = str(config._name_or_path or type(model).__name__)
    rows = b"".join(raw_bytes(site.weight[0]) for site in sites(unwrapped(model)))
    of_files = f" {files_digest(name)}" if Path(name).is_dir() else ""
    return f"{name} {hashlib.sha256(rows).hexdigest()[:16]}{of_files}"


def _check_base(model: nn.Module, base: nn.Module) -> None:
    """That locks of the base fit, which is to be known before anything is asked or written."""
    check_unlocked(unwrapped(base), _WITHOUT)
    its = _geometry(base)
    for key, value in _geometry(model).items():
        if its[key] != value:
            raise FastlockError(
                f"base: its {key} is {its[key]}, but {value} in the model ({_name(model)}). Give the aligned base that "
                "this model was made from."
            )
    for site in sites(model):
        check_foldable(site)


def _geometry(model: nn.Module) -> dict[str, int]:
    """The numbers that a base and its fine-tunes share."""
    config = text_config(unwrapped(model))
    num_heads, head_dim = head_geometry(config)
    return {
        "num_layers": len(sites(model)),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
    }


def _check_given(model: nn.Module, lock: Lock, others: Mapping[str, Any]) -> None:
    """That the lock fits, which is to be known before anything is asked or written, and that nothing else is given."""
    if superfluous := [name for name, given in others.items() if given is not None]:
        raise FastlockError(
            f"lock and {superfluous[0]} are both given: either the strength of this lock is searched, or locks are "
            "made from a base. Leave one of the two out."
        )
    with relocked(model, lock, max(SWEEP)):
        pass


def _divided(prompts: Prompts, held_out: Prompts | None, seed: int) -> tuple[Prompts, Prompts]:
    """What decides and what is reported: halves of one set, if there is only one."""
    for given, name in ((prompts, "prompts"), (held_out, "held_out")):
        if given is not None and not (given.harmful and given.harmless):
            raise FastlockError(f"{name}: harmful and harmless prompts are both needed to find a trade between them.")
    if held_out is not None:
        _check_apart(prompts, held_out)
        return prompts, held_out
    random = np.random.RandomState(seed)
    first, second = {}, {}
    for kind, texts in vars(prompts).items():
        distinct = list(dict.fromkeys(texts))
        if len(distinct) == 1:
            raise FastlockError(f"{kind}: one alone can't both decide and be held out. Give more, or a set held out.")
        order = random.permutation(len(distinct))
        half = -(-len(distinct) // 2)
        first[kind] = tuple(distinct[i] for i in order[:half])
        second[kind] = tuple(distinct[i] for i in order[half:])
    return Prompts(**first), Prompts(**second)


def _check_apart(prompts: Prompts, held_out: Prompts) -> None:
    """That nothing which is reported decides; ordinary texts may, for a perplexity is no answer to learn."""
    both = {*prompts.harmful, *prompts.harmless} & {*held_out.harmful, *held_out.harmless}
    if both:
        raise FastlockError(f"{min(both)[:80]!r} both decides and is held out. Remove it from one of them.")


def _rates(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation without its answers."""
    return {key: value for key, value in evaluation.to_dict().items() if key not in ("harmful", "harmless", "lock")}
