"""Directions, scales and scores, a group of heads at a time; their values are tested with the extraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlock import FastlockError
from fastlock.recipes import head_scores as module
from fastlock.recipes.activations import Activations
from fastlock.recipes.head_scores import EFFECT_SIZE, REGRESSION, statistics

SHAPE = (3, 5, 40, 8)


@pytest.fixture
def given(tmp_path: Path) -> tuple[Activations, Any, Any]:
    """Random activations, their kinds and which train."""
    random = np.random.RandomState(0)
    random.standard_normal(SHAPE).astype(np.float32).tofile(tmp_path / "activations")
    return Activations(tmp_path / "activations", SHAPE), np.arange(40) % 2 == 0, np.arange(40) % 5 < 3


def found(given: tuple[Activations, Any, Any], trained: bool, device: str = "cpu") -> list[Any]:
    activations, safe, train = given
    scoring = REGRESSION if trained else EFFECT_SIZE
    result = statistics(activations, safe, train, scoring, torch.device(device), lambda items, _: items)
    return [result.scores, result.directions, result.scales]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("heads", [0, 1, 2, 4])
def test_groups_of_heads_give_what_all_at_once_do(
    given: tuple[Activations, Any, Any], heads: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes, read = found(given, trained), [], Activations.read

    def spy(self: Activations, layer: int, part: slice) -> Any:
        sizes.append(part.stop - part.start)
        return read(self, layer, part)

    monkeypatch.setattr(Activations, "read", spy)
    monkeypatch.setattr(module, "GROUP_BYTES", heads * 40 * 8 * 8)
    for a, b in zip(found(given, trained), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert sizes == {0: [1] * 5, 1: [1] * 5, 2: [2, 2, 1], 4: [4, 1]}[heads] * 3


def test_groups_are_halved_where_memory_runs_out(
    given: tuple[Activations, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = found(given, True), module.head_statistics

    def small(most: int) -> Any:
        def work(x: torch.Tensor, *others: Any) -> Any:
            if len(x) > most:
                raise torch.OutOfMemoryError("too much")
            return whole(x, *others)

        return work

    monkeypatch.setattr(module, "head_statistics", small(2))
    for a, b in zip(found(given, True), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(module, "head_statistics", small(0))
    with pytest.raises(FastlockError, match="memory runs out with the 40 vectors of layer 0, head 0 alone"):
        found(given, True)


def test_a_device_without_float64_leaves_the_work_to_the_cpu(given: tuple[Activations, Any, Any]) -> None:
    for a, b in zip(found(given, True, "mps"), found(given, True), strict=True):
        np.testing.assert_array_equal(a, b)
