"""The recipe "prompt-end", our own: the base reads harmful and harmless prompts, and their last tokens count.

A lock made so acts before any answer: it leads to how the base reads what it would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlock.inference.chat import check_row, prompt_tokens
from fastlock.recipes.head_scores import EFFECT_SIZE
from fastlock.recipes.pairs import Pair
from fastlock.recipes.recipe import LabelledText, Recipe


def _prompt_ends(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], harmless: Sequence[str], tokens: int
) -> list[LabelledText]:
    """The questions of the pairs, then the harmless prompts."""
    prompts = [(f"pair {number}", pair.question, True) for number, pair in enumerate(pairs, start=1)]
    prompts += [(f"harmless prompt {number}", prompt, False) for number, prompt in enumerate(harmless, start=1)]
    texts = []
    for index, (name, words, harmful) in enumerate(prompts):
        ids, _ = prompt_tokens(tokenizer, words)
        texts.append(LabelledText(ids, min(tokens, len(ids)), name, index, harmful))
        check_row(model, ids, name)
    return texts


PROMPT_END = Recipe(
    name="prompt-end",
    reads="last {} prompt tokens",
    tokens=1,
    searched=(1, 2, 4),
    texts=_prompt_ends,
    scoring=EFFECT_SIZE,
    reads_harmless=True,
)
