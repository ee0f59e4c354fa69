"""What can be searched: a lock of a base, or the strength of a given lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from fastlock.inference.batching import Progress
from fastlock.locks.lock import Lock
from fastlock.recipes.bases import geometry, identity
from fastlock.recipes.extraction import Ranking, rank_heads
from fastlock.recipes.pairs import pair_from, pairs_digest, shipped_harmless, shipped_pairs
from fastlock.recipes.recipe_table import RECIPES
from fastlock.recipes.search_journal import measured_trials
from fastlock.recipes.trials import GATE_SWEEP, SWEEP, Candidate, Trial, best, best_strength, next_strength

# Recipes, each with a number of tokens that it reads.
POSITIONS = tuple(f"{recipe.name}/{tokens}" for recipe in RECIPES.values() for tokens in recipe.searched)

# The share of all heads that is locked, and the strengths: at least and at most.
HEADS = (1 / 64, 1 / 2)
STRENGTHS = (0.1, 8.0)


class Search(Protocol):
    """A search for a lock at a strength.

    Attributes:
        description: what it does, for the progress.
        facts: what makes it this search and no other, as JSON can hold it.
        trials: how many are tried by default.
    """

    description: str
    facts: dict[str, str]
    trials: int

    def suggestion(self, trial: Any) -> Candidate:
        """What to try in Optuna's next trial."""

    def lock(self, candidate: Candidate) -> Lock:
        """The lock of a candidate."""

    def best(self, trials: Sequence[Trial]) -> Trial:
        """The trial to choose."""


class StrengthSearch:
    """The search for the strength of a given lock: in `sweep` first, and then between these."""

    description = "Trying strengths"
    trials = 20

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self.sweep = GATE_SWEEP if lock.rank else SWEEP
        self.facts = {"lock": lock.digest}

    def suggestion(self, trial: Any) -> Candidate:
        """The strength to try, by the trials before; the study only keeps it."""
        return Candidate(None, None, None, next_strength(measured_trials(trial.study), self.sweep))

    def lock(self, candidate: Candidate) -> Lock:
        """The given lock, whatever the candidate."""
        return self._lock

    def best(self, trials: Sequence[Trial]) -> Trial:
        """The trial to choose, which may be that of strength 0."""
        return best_strength(trials)


class LockSearch:
    """The search for a lock: of a base's heads by recipe and number of tokens, each ranked when first asked for.

    Args:
        base, tokenizer, pairs, harmless, seed, progress: as for `fastlock.calibrate`.

    Raises:
        FastlockError: a pair cannot be used.
    """

    description = "Trying locks"
    trials = 60

    def __init__(
        self,
        base: nn.Module,
        tokenizer: Any,
        pairs: Iterable[Any] | None,
        harmless: Iterable[str] | None,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._rankings: dict[tuple[str, int], Ranking] = {}
        self._base, self._tokenizer, self._seed, self._progress = base, tokenizer, seed, progress
        self._pairs = shipped_pairs() if pairs is None else tuple(pairs)
        self._harmless = shipped_harmless() if harmless is None else tuple(harmless)
        numbers = geometry(base)
        self._num_heads = numbers["num_layers"] * numbers["num_heads"]
        digest = pairs_digest([pair_from(pair, "a pair") for pair in self._pairs], self._harmless)
        self.facts = {"base": identity(base), "extraction set": digest}

    def suggestion(self, trial: Any) -> Candidate:
        """How the next lock is made, and its strength."""
        recipe, tokens = trial.suggest_categorical("position", POSITIONS).rsplit("/", 1)
        share = trial.suggest_float("heads", *HEADS, log=True)
        strength = trial.suggest_float("strength", *STRENGTHS, log=True)
        return Candidate(recipe, int(tokens), max(1, round(share * self._num_heads)), strength)

    def lock(self, candidate: Candidate) -> Lock:
        """The lock of a candidate.

        Raises:
            FastlockError, and its kinds: as for `fastlock.extract`.
        """
        if candidate.recipe is None or candidate.tokens is None or candidate.heads is None:
            raise TypeError(f"{candidate} does not say how its lock is made")
        return self._ranking(candidate.recipe, candidate.tokens).lock(candidate.heads)

    def best(self, trials: Sequence[Trial]) -> Trial:
        """The trial to choose."""
        return best(trials)

    def _ranking(self, recipe: str, tokens: int) -> Ranking:
        key = (recipe, tokens)
        if key not in self._rankings:
            self._rankings[key] = rank_heads(
                self._base,
                self._tokenizer,
                self._pairs,
                tokens,
                recipe=recipe,
                harmless=self._harmless if RECIPES[recipe].reads_harmless else None,
                seed=self._seed,
                progress=self._progress,
            )
        return self._rankings[key]
