"""The frontier of trials, the trial to choose, and the strength to try next."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fastlock.recipes.trials import SWEEP, Trial, best, best_strength, frontier, next_strength
from tests.helpers.calibrating import at, trial


def test_the_frontier_is_what_nothing_beats() -> None:
    """Against the definition, on random trials with many ties."""
    random = np.random.RandomState(0)
    trials = [trial(*random.randint(0, 5, 3) / 4 + [0, 0, 1]) for _ in range(200)]
    found = frontier(trials)

    def beats(a: Trial, b: Trial) -> bool:
        no_worse = a.refusals >= b.refusals and a.over_refusals <= b.over_refusals and a.cost <= b.cost
        return no_worse and (a.refusals > b.refusals or a.over_refusals < b.over_refusals or a.cost < b.cost)

    unbeaten = {(t.refusals, t.over_refusals, t.cost) for t in trials if not any(beats(other, t) for other in trials)}
    assert {(t.refusals, t.over_refusals, t.cost) for t in found} == unbeaten
    assert len(found) == len(unbeaten)
    assert [t.refusals for t in found] == sorted((t.refusals for t in found), reverse=True)


def test_the_best_that_fits_is_chosen() -> None:
    fits = trial(0.7, 0.02, 1.03)
    assert best([trial(1.0, 0.03, 1.0), trial(1.0, 0.0, 1.04), fits, trial(0.6, 0.0, 1.0)]) == fits


def test_what_a_model_refuses_as_it_is_may_be_refused() -> None:
    """Else only a lock that takes refusals away would fit."""
    for tried, strength in (
        ([(0, 0.95, 0.05, 1.0), (1, 0.97, 0.3, 1.01), (8, 0.10, 0.0, 1.0)], 0),
        ([(0, 0.0, 0.05, 1.0), (1, 1.0, 0.05, 1.0), (8, 0.0, 0.0, 1.02)], 1),
        ([(0, 0.9, 0.05, 1.0), (0.125, 0.85, 0.0, 1.0), (1, 1.0, 0.05, 1.0)], 1),
    ):
        assert (
            best_strength([dataclasses.replace(at(*numbers), allowed=0.05) for numbers in tried]).strength == strength
        )


def test_a_strength_that_refuses_less_is_never_chosen() -> None:
    assert best_strength([at(0, 0.95, 0.3, 1.0), at(1, 0.9, 0.0, 1.0)]).strength == 0


def test_without_one_that_fits_the_best_compromise_is() -> None:
    compromise = trial(0.9, 0.1, 1.1)
    assert best([trial(1.0, 0.9, 1.0), compromise, trial(0.95, 0.1, math.e)]) == compromise


def test_a_lower_cost_alone_needs_no_lock() -> None:
    as_it_is = at(0, 0.9, 0.05)
    assert best_strength([at(1, 0.9, 0.05, 0.5), at(2, 0.8, 0.1, 0.5), as_it_is]) == as_it_is
    for helps in (at(1, 0.95, 0.05), at(1, 0.9, 0.0)):
        assert best_strength([as_it_is, helps]) == helps


def test_the_strength_is_refined_around_the_best_and_then_wherever_little_was_tried() -> None:
    """What fits ends at a strength that is no power of 2; the more the stronger until there."""
    limit, tried = 0.3117, []
    for _ in range(30):
        strength = next_strength(tried, SWEEP)
        tried.append(at(strength, min(1.0, strength), 0.0, 1.0 if strength <= limit else 1.04))
    strengths = [trial.strength for trial in tried]
    assert strengths[:8] == [0.0, 1.0, 4.0, 0.25, 2.0, 0.5, 8.0, 0.125]
    assert len(set(strengths)) == 30
    assert limit - 0.01 < best_strength(tried[:18]).strength <= limit
    assert min(abs(a - b) for i, a in enumerate(strengths) for b in strengths[:i]) > 0.005 / 2
    assert {3.0, 5.0, 6.0, 7.0} <= set(strengths)
