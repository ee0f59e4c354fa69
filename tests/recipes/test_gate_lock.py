"""Which layers get a gate, as a caller may name them."""

from __future__ import annotations

import pytest

import fastlock
from fastlock.recipes.gate_lock import checked_layers


def test_layers_are_ascending_and_each_is_named_once() -> None:
    assert checked_layers([5, 2, 5, 3], 6) == (2, 3, 5)
    assert checked_layers(iter(range(4)), 6) == (0, 1, 2, 3)


@pytest.mark.parametrize(("layers", "message"), [([], "at least one layer"), ([6], "of this base"), ([-1], "from 0")])
def test_layers_that_the_base_does_not_have_are_refused(layers: list[int], message: str) -> None:
    with pytest.raises(fastlock.FastlockError, match=message):
        checked_layers(layers, 6)
