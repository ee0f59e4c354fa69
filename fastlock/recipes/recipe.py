"""What a recipe is: what an aligned base reads, and how its heads are scored by what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlock.recipes.activations import ReadText
from fastlock.recipes.head_scores import Scoring
from fastlock.recipes.pairs import Pair


@dataclass(frozen=True)
class LabelledText(ReadText):
    """A text to read, and of which kind it is.

    Attributes:
        owner: the texts of one owner, of one pair say, train together or validate together; counted from 0.
        safe: whether it is of the kind that the lock leads to.
    """

    owner: int
    safe: bool


Texts = Callable[[nn.Module, Any, Sequence[Pair], Sequence[str], int], list[LabelledText]]
"""Given a model, its tokenizer, pairs, harmless prompts and a number of tokens, what the model reads."""


@dataclass(frozen=True)
class Recipe:
    """A way to make a lock of an aligned base; `recipe_table.py` has the table.

    Attributes:
        name: what a user calls it.
        reads: which tokens it reads, with a place for their number.
        tokens: how many tokens it reads by default.
        searched: the numbers of tokens that `calibrate` tries.
        texts: what the model reads.
        scoring: how heads are scored.
        reads_harmless: whether it reads harmless prompts, too.
    """

    name: str
    reads: str
    tokens: int
    searched: tuple[int, ...]
    texts: Texts
    scoring: Scoring
    reads_harmless: bool = False

    def description(self, heads: int, tokens: int, seed: int) -> str:
        """How a lock was made, for its metadata."""
        seeded = f", seed {seed}" if self.scoring.splits else ""
        return f"{self.name}: {self.reads.format(tokens)}, {heads} heads by {self.scoring.name}{seeded}"
