"""What a recipe is that makes a gate, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlock.inference.batching import Progress
from fastlock.locks.lock import Lock
from fastlock.models.sites import Site, sites, unwrapped
from fastlock.recipes.extraction_checks import check_extractable, checked_pairs, checked_prompts
from fastlock.recipes.pairs import Pair, pairs_digest, shipped_harmless, shipped_scary, shipped_texts


@dataclass(frozen=True)
class GateMaterial:
    """What a gate is extracted from, all of it checked.

    Attributes:
        base: the aligned base.
        sites: its output projections.
        tokenizer: its tokenizer.
        pairs: harmful requests, each with a refusal and the beginning of an answer.
        harmless: requests that the base answers.
        scary: further ones, which only sound harmful.
        texts: ordinary texts.
    """

    base: nn.Module
    sites: Sequence[Site]
    tokenizer: Any
    pairs: tuple[Pair, ...]
    harmless: tuple[str, ...]
    scary: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        tokenizer: Any,
        pairs: Iterable[Pair | Mapping[str, Any]],
        harmless: Iterable[str] | None,
        scary: Iterable[str] | None,
        texts: Iterable[str] | None,
    ) -> GateMaterial:
        """What was given, with the shipped prompts and texts for what was not.

        Raises:
            UnsupportedError: the model's family is refused, or some of its layers share one output projection.
            FastlockError: a pair or a text cannot be used, or the model is relocked.
        """
        base = unwrapped(model)
        all_sites = sites(base)
        check_extractable(base, all_sites)
        return cls(
            base,
            all_sites,
            tokenizer,
            checked_pairs(pairs),
            shipped_harmless() if harmless is None else checked_prompts("harmless", harmless),
            shipped_scary() if scary is None else checked_prompts("scary", scary, least=0),
            shipped_texts() if texts is None else checked_prompts("texts", texts, least=1),
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the pairs, prompts and texts."""
        return pairs_digest(self.pairs, (*self.harmless, *self.scary, *self.texts))


@dataclass(frozen=True)
class GateRecipe:
    """A way to make a lock with a gate of an aligned base; `recipe_table.py` has the table.

    Attributes:
        name: what a user calls it.
        lock: given the material, the rank, how many tokens of each answer are read, the layers with a gate (None: as
            the recipe does), and what shows how far it is: the lock.
    """

    name: str
    lock: Callable[[GateMaterial, int | None, int | None, Iterable[int] | None, Progress], Lock]
