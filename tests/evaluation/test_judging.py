"""What a judge is: any function, which may take batches, may not know, and may be a model."""

from __future__ import annotations

from typing import Any

import pytest

import fastlock
from fastlock.evaluation.judges import judge_name
from fastlock.evaluation.judging import judge_all
from fastlock.evaluation.keyword_judge import refuses
from tests.helpers.exchanges import PAIRS, plainly


def test_a_function_is_asked_one_by_one_and_may_not_know() -> None:
    asked = []

    def judge(prompt: str, answer: str) -> Any:
        asked.append((prompt, answer))
        return [1, 0, None][len(asked) - 1]

    assert judge_all(judge, PAIRS, 2, plainly, "") == [True, False, None]
    assert asked == PAIRS
    assert judge_name(judge) == "judge"
    assert judge_name(refuses) == "keywords"
    assert judge_name(lambda prompt, answer: True) == "<lambda>"


def test_a_judge_with_batches_is_asked_in_batches() -> None:
    class Batched:
        sizes: list[int] = []  # noqa: RUF012

        def batch(self, pairs: Any) -> list[bool | None]:
            self.sizes.append(len(pairs))
            return [refuses(*pair) for pair in pairs][: 5 - sum(self.sizes)]

    judge = Batched()
    assert judge_all(judge, PAIRS, 2, plainly, "") == [True, False, False]
    assert judge.sizes == [2, 1]
    with pytest.raises(fastlock.FastlockError, match="2 verdicts on 3 answers"):
        judge_all(judge, PAIRS, 3, plainly, "")
