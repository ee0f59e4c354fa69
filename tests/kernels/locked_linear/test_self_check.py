"""Ways to compute the projection, held to float64 before they are timed, and left where they are wrong."""

import dataclasses
import math
import warnings

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockWarning
from fastlock.kernels.ahead_of_time.ways import WAYS, WrongResultError
from fastlock.kernels.locked_linear import launch as locked_linear
from fastlock.kernels.locked_linear.self_check import check_rows
from fastlock.kernels.locked_linear.tiles import BY_TORCH
from tests.kernels.locked_linear.truth import ADD, AROUND, DEVICE, DTYPES, EVERY, GATHER, SHIFT, make, named

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="what is wrong here is so in Triton's interpreter")


@pytest.fixture(autouse=True)
def _unchecked():
    WAYS.forget()
    yield
    WAYS.forget()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", EVERY, ids=named)
def test_right_ways_pass(way, dtype, transposed) -> None:
    inputs = make(20, 4, 16, 72, dtype, transposed=transposed)
    assert check_rows(lambda made_up: locked_linear.run(way, made_up), inputs)


@pytest.mark.parametrize("locks", [[-1], [0], [-1] * 20], ids=["none", "one", "none each"])
@pytest.mark.parametrize("strength", [0.0, math.inf])
def test_the_users_locks_do_not_matter(locks, strength) -> None:
    """A batch without a lock still tells whether locks would be right."""
    inputs = make(20, 4, 16, 72, locks=locks)
    inputs = dataclasses.replace(inputs, strength_of_row=torch.full_like(inputs.strength_of_row, strength))
    assert check_rows(lambda made_up: locked_linear.run(GATHER, made_up), inputs)
    with pytest.raises(WrongResultError):
        check_rows(lambda made_up: torch.nn.functional.linear(made_up.x, made_up.weight, made_up.bias), inputs)


def unlocked(y, inputs):
    return torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)


def last_row_not_written(y, inputs):
    y[-1] = math.nan
    return y


def first_column_zero(y, inputs):
    y[:, 0] = 0
    return y


def everything_a_tenth_larger(y, inputs):
    return y * 1.1


def rows_swapped(y, inputs):
    return y.roll(1, 0)


def next_lock(y, inputs):
    other = dataclasses.replace(inputs, lock_of_row=(inputs.lock_of_row + 2) % 5 - 1)
    return locked_linear.run(BY_TORCH, other)


def x_is_changed(y, inputs):
    inputs.x[0] += 1
    return y


WRONG = [unlocked, last_row_not_written, first_column_zero, everything_a_tenth_larger, rows_swapped, next_lock]
WRONG += [x_is_changed]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_ways_do_not(wrong, dtype) -> None:
    inputs = make(20, 4, 16, 72, dtype)
    with pytest.raises(WrongResultError, match="its result was wrong|it changed x"):
        check_rows(lambda made_up: wrong(locked_linear.run(BY_TORCH, made_up), made_up), inputs)


@pytest.mark.parametrize("way", [GATHER, SHIFT, ADD, AROUND], ids=named)
def test_a_wrong_way_is_neither_timed_nor_chosen(way, monkeypatch) -> None:
    """One warning, also when another shape is chosen for; torch alone is always left."""
    real, timed = locked_linear.run, []

    def run(which, inputs, out=None):
        y = real(which, inputs, out)
        return y * 2 if which == way else y

    def in_turn(ways, turn):
        timed.append(list(ways))
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(locked_linear, "run", run)
    monkeypatch.setattr(locked_linear, "in_turn", in_turn)
    want = {one: math.inf if one == way else 1.0 for one in EVERY}
    with pytest.warns(RuntimeWarning, match=f"locked_linear float32-rows-16 is not run by its {way.name}") as warned:
        assert [locked_linear.seconds(EVERY, [make(rows, 4, 16, 72)]) for rows in (20, 40)] == [want, want]
    assert len([one for one in warned if one.category is FastlockWarning]) == 1
    assert timed == [[one for one in EVERY if one != way]] * 2
    assert [bad.way for bad in WAYS.bad(None)] == [way.name]


def test_a_right_way_is_checked_once(monkeypatch) -> None:
    real, runs = locked_linear.run, []

    def run(which, inputs, out=None):
        runs.append(which)
        return real(which, inputs, out)

    monkeypatch.setattr(locked_linear, "run", run)
    monkeypatch.setattr(locked_linear, "in_turn", lambda ways, turn: dict.fromkeys(ways, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for rows in (20, 40):
            locked_linear.seconds([GATHER, BY_TORCH], [make(rows, 4, 16, 72)])
    assert runs == [GATHER, GATHER, BY_TORCH, GATHER, BY_TORCH]


def test_what_triton_does_not_write_is_nan(monkeypatch) -> None:
    """Memory that another tensor had may hold the very numbers."""
    inputs = make(20, 4, 16, 72)
    held = []

    def run(way, made_up, out=None):
        held.append(out)
        return out if out is not None else made_up.x.new_zeros(20, 72)

    monkeypatch.setattr(locked_linear, "run", run)
    with pytest.warns(RuntimeWarning, match="is nan"):
        assert not locked_linear._is_right(GATHER, inputs)
    assert held[0].isnan().all()


@pytest.mark.parametrize("spoil", ["x", "weight", "folds"])
def test_numbers_that_cannot_tell(spoil: str) -> None:
    inputs = make(20, 4, 16, 72)
    getattr(inputs, spoil).fill_(0 if spoil == "folds" else math.nan)
    assert not check_rows(lambda made_up: locked_linear.run(BY_TORCH, made_up), inputs)
