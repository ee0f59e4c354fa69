"""What an extraction is given, checked: pairs, prompts, and the base itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.models.reloaded import check_unlocked
from fastlock.models.sites import Site
from fastlock.recipes.pairs import Pair, pair_from


def checked_pairs(pairs: Any) -> tuple[Pair, ...]:
    """The distinct pairs, in order: a repeated one could both train and validate.

    Raises:
        FastlockError: there are fewer than two, or one of them cannot be used.
    """
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise FastlockError(
            f"pairs is of type {type(pairs).__name__}; read a file with fastlock.load_pairs(path) first."
        )
    if isinstance(pairs, Mapping):
        raise FastlockError(f"pairs is a {type(pairs).__name__} of {', '.join(map(str, pairs))}. Give a list of pairs.")
    distinct = tuple(dict.fromkeys(pair_from(entry, f"pair {n}") for n, entry in enumerate(pairs, start=1)))
    if len(distinct) < 2:
        raise FastlockError(
            f"there {'are no pairs' if not distinct else 'is only one pair'}; some train and others validate. Give at "
            "least two different pairs; the paper takes 100, and fastlock.shipped_pairs() has as many."
        )
    return distinct


def checked_prompts(name: str, prompts: Any, least: int = 2) -> tuple[str, ...]:
    """The distinct prompts, in order.

    Args:
        name: what the argument is called.
        prompts: what was given for it.
        least: how many there must be.

    Raises:
        FastlockError: there are fewer, or one of them is not a text.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise FastlockError(f"{name} is of type {type(prompts).__name__}; give a list of texts.")
    distinct = tuple(dict.fromkeys(prompts))
    if len(distinct) < least or not all(isinstance(text, str) and text.strip() for text in distinct):
        how_many = {2: "at least two different prompts, ", 1: "at least one text, "}.get(least, "texts, ")
        raise FastlockError(f"{name}: give {how_many}none of them empty.")
    return distinct


def check_extractable(model: nn.Module, all_sites: Sequence[Site]) -> None:
    """Refuse a model that no lock can be extracted from.

    Raises:
        UnsupportedError: some of its layers share one output projection.
        FastlockError: it is relocked.
    """
    check_unlocked(model, "a lock comes from the base without one")
    if len({id(site.module) for site in all_sites}) < len(all_sites):
        raise UnsupportedError(
            f"{type(model).__name__}: some of its layers share one output projection, and a lock on one would act in "
            "the others too. Such a model cannot be locked."
        )
