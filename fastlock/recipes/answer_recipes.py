"""The recipes that read answers: "safetylock", the paper's (arXiv 2410.10343), and "answer-start", our own.

The base reads each question with its safe and with its unsafe answer. What counts are the last tokens of the answers
(safetylock), or the first ones (answer-start).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlock.errors import FastlockError
from fastlock.inference.chat import check_row, prompt_tokens
from fastlock.recipes.head_scores import REGRESSION
from fastlock.recipes.pairs import Pair
from fastlock.recipes.recipe import LabelledText, Recipe


def _answers(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], _harmless: Sequence[str], tokens: int, *, whole: bool
) -> list[LabelledText]:
    """The safe answer of each pair, then the unsafe one: `whole`, or no more than the tokens that count."""
    texts = []
    for index, pair in enumerate(pairs):
        prompt, space = prompt_tokens(tokenizer, pair.question)
        for safe, words in ((True, pair.safe), (False, pair.unsafe)):
            answer = list(tokenizer(space + words, add_special_tokens=False)["input_ids"])
            if not answer:
                raise FastlockError(
                    f"pair {index + 1}: the tokenizer makes no tokens of the answer {words[:80]!r}. Remove the pair."
                )
            answer = answer if whole else answer[:tokens]
            text = LabelledText(prompt + answer, min(tokens, len(answer)), f"pair {index + 1}", index, safe)
            check_row(model, text.ids, text.name)
            texts.append(text)
    return texts


SAFETYLOCK = Recipe(
    name="safetylock",
    reads="last {} answer tokens",
    tokens=5,
    searched=(1, 5),
    texts=functools.partial(_answers, whole=True),
    scoring=REGRESSION,
)

ANSWER_START = Recipe(
    name="answer-start",
    reads="first {} answer tokens",
    tokens=5,
    searched=(1, 5),
    texts=functools.partial(_answers, whole=False),
    scoring=REGRESSION,
)
