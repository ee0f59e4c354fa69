"""Intervals and paired tests, against scipy and by counting every case."""

import itertools

import pytest
from scipy import stats

from fastlock.evaluation.significance import holm, mcnemar, wilson_interval


@pytest.mark.parametrize("trials", [1, 2, 7, 100, 721])
def test_wilson_is_scipys(trials) -> None:
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    for first, second in itertools.product((0, 1, 2, 5, 9, 40, 371), repeat=2):
        expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9), (first, second)


def test_mcnemar_counts_every_way_the_coins_could_fall() -> None:
    flips = list(itertools.product((0, 1), repeat=7))
    as_uneven = sum(abs(2 * sum(one) - 7) >= abs(6 - 1) for one in flips)
    assert mcnemar(6, 1) == as_uneven / len(flips)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
