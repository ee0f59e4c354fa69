"""Lisa's schedule: a pure function of the optimizer step."""

import math
from dataclasses import FrozenInstanceError

import pytest

from fastlock.errors import FastlockError
from fastlock.finetuning.lisa_schedule import Lisa


def counted(alignment_steps, user_steps, free_steps, steps):
    """The states, switches and freedom of the first steps, by counters that go on as the authors' code does."""
    states, switches, free = [], [], []
    state, left, still_free = ("alignment", alignment_steps, True) if alignment_steps else ("user", math.inf, False)
    switched = True
    for step in range(steps):
        if not left:
            state, left = ("user", user_steps) if state == "alignment" else ("alignment", alignment_steps)
            switched = True
        if switched and step >= free_steps:
            still_free = False
        states.append(state)
        switches.append(switched)
        free.append(still_free)
        left, switched = left - 1, False
    return states, switches, free


@pytest.mark.parametrize(
    ("alignment_steps", "user_steps", "free_steps"),
    [(3, 7, 0), (3, 7, 1), (3, 7, 3), (3, 7, 4), (3, 7, 10), (3, 7, 24), (1, 1, 5), (100, 900, 1), (0, 5, 0)],
)
def test_each_step_is_as_counted(alignment_steps, user_steps, free_steps):
    lisa = Lisa(alignment_steps, user_steps, 0.5, free_steps)
    states, switches, free = counted(alignment_steps, user_steps, free_steps, 2300)
    assert [lisa.state(step) for step in range(2300)] == states
    assert [lisa.switches_at(step) for step in range(2300)] == switches
    assert [lisa.pull_at(step) for step in range(2300)] == [0.0 if is_free else 0.5 for is_free in free]
    of_user = [step for step, state in enumerate(states) if state == "user"]
    assert [lisa.step_of(i) for i in range(len(of_user))] == of_user
    assert [lisa.user_steps_before(step) for step in range(2300)] == [
        sum(state == "user" for state in states[:step]) for step in range(2300)
    ]


def test_a_free_step_ends_at_a_switch_only():
    lisa = Lisa(3, 7, 1.0, free_steps=4)  # in the middle of the first user state, which ends before step 10
    assert [lisa.pull_at(step) for step in range(12)] == [0.0] * 10 + [1.0] * 2


def test_it_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Lisa(1, 1, 1.0).pull = 2.0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0, 1.0), "user_steps is 0; it must be an integer from 1"),
        ((3, 0, 1.0), "user_steps is 0"),
        ((-1, 7, 1.0), "alignment_steps is -1"),
        ((1.5, 7, 1.0), "alignment_steps is 1.5"),
        ((True, 7, 1.0), "alignment_steps is True"),
        ((3, 7, -0.1), "pull is -0.1; it must be a number, 0 or more"),
        ((3, 7, math.nan), "pull is nan"),
        ((3, 7, math.inf), "pull is inf"),
        ((3, 7, "1"), "pull is '1'"),
        ((3, 7, True), "pull is True"),
        ((3, 7, 1.0, -1), "free_steps is -1"),
        ((0, 7, 1.0, 2), "free_steps is 2, but alignment_steps is 0"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(FastlockError, match=message):
        Lisa(*numbers)
