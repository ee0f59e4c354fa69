"""The batched logistic regressions, against scikit-learn's, one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastlock import DamagedError
from fastlock.recipes import probes
from fastlock.recipes.probes import accuracies, fit

HEADS = 3


def data(vectors: int, head_dim: int, size: float, apart: float, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise far off zero, [HEADS, vectors, head_dim], one class of which is shifted; and the classes, both there."""
    generator = torch.Generator().manual_seed(vectors + head_dim)
    x = torch.randn(HEADS, vectors, head_dim, generator=generator, dtype=torch.float64) + 3
    y = torch.rand(vectors, generator=generator) < share
    y[0], y[1] = True, False
    x[:, y] += apart
    return size * x, y


def oracle(x: torch.Tensor, y: torch.Tensor) -> Any:
    return LogisticRegression(tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(x.numpy(), y.numpy())


CASES = {
    "overlapping": (400, 8, 1.0, 0.3, 0.5),
    "separable": (300, 64, 1.0, 2.0, 0.5),
    "noise": (600, 32, 1.0, 0.0, 0.5),
    "fewer vectors than numbers": (20, 64, 1.0, 0.3, 0.5),
    "one class is rare": (500, 8, 1.0, 0.5, 0.02),
    "small numbers": (300, 16, 1e-3, 0.5, 0.5),
    "large numbers": (300, 16, 1e3, 0.1, 0.5),
    "large and separable": (300, 64, 1e2, 2.0, 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_scikit_learn(case: str) -> None:
    x, y = data(*CASES[case])
    w, b = fit(x, y)
    for head in range(HEADS):
        expected = oracle(x[head], y)
        weights = expected.coef_[0]
        np.testing.assert_allclose(w[head].numpy(), weights, rtol=0, atol=1e-5 * np.abs(weights).max())
        np.testing.assert_allclose(float(b[head]), expected.intercept_[0], rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("case", CASES)
def test_no_gradient_is_left(case: str, size: float) -> None:
    """At the minimum the penalty's gradient w and the losses' cancel; written out in NumPy."""
    x, y = data(*CASES[case])
    x = size * x
    w, b = fit(x, y)
    for head in range(HEADS):
        rows, sign = x[head].numpy(), np.where(y.numpy(), 1.0, -1.0)
        slope = -sign * np.exp(-np.logaddexp(0, sign * (rows @ w[head].numpy() + float(b[head]))))
        terms = np.abs(rows * slope[:, None]).sum(axis=0).max()
        assert np.abs(slope @ rows + w[head].numpy()).max() <= 1e-5 * terms
        assert abs(slope.sum()) <= 1e-5 * np.abs(slope).sum()


@pytest.mark.parametrize("case", CASES)
def test_the_accuracies_are_those_of_scikit_learn(case: str) -> None:
    x, y = data(*CASES[case])
    train = torch.arange(len(y)) % 5 < 3
    expected = []
    for head in range(HEADS):
        probe = oracle(x[head, train], y[train])
        parts = [probe.score(x[head, part].numpy(), y[part].numpy()) for part in (train, ~train)]
        expected.append(sum(parts) / 2)
    assert accuracies(x, y, train).tolist() == expected


def test_a_head_is_scored_as_if_it_were_alone() -> None:
    x = torch.cat([data(200, 16, size, apart, 0.5)[0] for size, apart in ((1.0, 0.2), (50.0, 3.0), (1e-3, 0.0))])
    y = data(200, 16, 1.0, 0.0, 0.5)[1]
    w, b = fit(x, y)
    for head in range(len(x)):
        alone, intercept = fit(x[head : head + 1], y)
        torch.testing.assert_close(w[head], alone[0], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(b[head], intercept[0], rtol=1e-7, atol=1e-9)


def test_a_head_that_is_always_the_same_tells_nothing() -> None:
    y = torch.arange(10) < 4
    w, b = fit(torch.full((1, 10, 3), 7.0, dtype=torch.float64), y)
    assert w.abs().max() == 0
    assert float(b) == pytest.approx(np.log(4 / 6))
    train = torch.arange(10) % 2 == 0
    assert accuracies(torch.zeros(1, 10, 3, dtype=torch.float64), y, train).tolist() == [(3 / 5 + 3 / 5) / 2]


def test_a_step_that_is_too_long_is_shortened_until_it_descends() -> None:
    x, y = data(*CASES["overlapping"])
    sign = torch.where(y, 1.0, -1.0).double()
    w, z = x.new_zeros(HEADS, x.shape[2]), x.new_zeros(HEADS, len(y))
    step_w, step_b, decrement = probes._newton(x, sign, z, w)
    before = probes._objective(z, sign, w)
    times = torch.tensor([1.0, 64.0, 1024.0], dtype=torch.float64)
    step_w, step_b, decrement = step_w * times[:, None], step_b * times, decrement * times
    step_z = (x * step_w[:, None]).sum(dim=2) + step_b[:, None]
    size = probes._step_size(before, z, step_z, sign, w, step_w, decrement)
    assert size[0] == 1
    assert (size[1:] < 1 / 8).all()
    assert (probes._objective(z + size[:, None] * step_z, sign, w + size[:, None] * step_w) < before).all()


def test_what_does_not_come_to_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_STEPS", 2)
    with pytest.raises(DamagedError, match="does not converge"):
        fit(*data(*CASES["separable"]))
