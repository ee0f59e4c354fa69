"""The truth itself: the fold of a gate, its rounding and its bound."""

import dataclasses
from fractions import Fraction

import pytest
import torch

from fastlock.errors import FastlockError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold import reference
from fastlock.kernels.gate_fold.reference import exact_rewritten, gate_error_bound, rewrite, rewritten
from tests.kernels.gate_fold.made import make


def gate(rank, heads, head_dim):
    return torch.randn(rank, heads, head_dim, dtype=torch.float64), torch.randn(rank, heads, head_dim).double() * 0.1


def test_a_gate_against_exact_arithmetic() -> None:
    """Fractions have no rounding at all; heads in another order than in W, and one beside them that is not locked."""
    weight, (readers, writers) = torch.randn(3, 8), gate(2, 2, 2)
    found = exact_rewritten(HeadColumns(weight, (6, 2)), readers, writers)
    places = [6, 7, 2, 3]
    for row in range(3):
        c = [Fraction(weight[row, place].item()) for place in places]
        for i, of_row in enumerate(c):
            exact = of_row
            for v, u in zip(readers.flatten(1).tolist(), writers.flatten(1).tolist(), strict=True):
                exact += sum(a * Fraction(b) for a, b in zip(c, u, strict=True)) * Fraction(v[i])
            assert found[row, i].item() == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_rounded_once_and_to_the_nearest(dtype) -> None:
    weight, (readers, writers) = torch.randn(40, 3 * 16).to(dtype), gate(3, 2, 16)
    columns = HeadColumns.in_projection(weight, (0, 2), 16)
    new, exact = rewritten(columns, readers, writers), exact_rewritten(columns, readers, writers)
    assert (new.dtype, new.shape) == (dtype, (40, 32))
    larger = new.abs() + torch.finfo(dtype).eps * new.abs() * 0.75  # rounds to the next one
    assert ((new.double() - exact).abs() * 2 <= (larger - new.abs()).double().abs() + 1e-300).all()
    bound = gate_error_bound(columns, readers, writers)
    assert ((new.double() - exact).abs() <= bound).all()
    assert (bound <= 2.0 * (larger - new.abs()).double().abs() + 1e-4 * exact.abs().max()).all(), "it says something"


def test_a_row_depends_on_itself_alone(monkeypatch) -> None:
    """To the bit: whoever streams the rows of a file, or shares them among threads, gets the same."""
    weight, (readers, writers) = torch.randn(90, 5 * 16, dtype=torch.float64), gate(2, 3, 16)
    whole = rewritten(HeadColumns(weight, (0, 32, 48)), readers, writers)
    monkeypatch.setattr(reference, "_BLOCK_NUMBERS", 7 * 48)
    assert torch.equal(rewritten(HeadColumns(weight, (0, 32, 48)), readers, writers), whole)
    for rows in (slice(0, 1), slice(1, 18), slice(18, 90)):
        part = rewritten(HeadColumns(weight[rows].t().contiguous().t(), (0, 32, 48)), readers, writers)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("to", [None, (3, 1, 0)])
def test_rewriting_in_place_and_elsewhere(to, monkeypatch) -> None:
    """Block by block; the constant part is of W as it was read, also where W is written over."""
    monkeypatch.setattr(reference, "_BLOCK_NUMBERS", 10 * 24)
    made = make(35, 8, (4, 0, 1), rank=2, dtype=torch.float64, to=to, constant=True)
    site, c = made.site, made.before
    assert rewrite(site) is True
    expected = c + (c @ site.writers.flatten(1).t()) @ site.readers.flatten(1)
    torch.testing.assert_close(made.written, expected)
    torch.testing.assert_close(site.out, c @ site.values.flatten() + site.bias)
    assert torch.equal(site.kept, c)
    assert sum(int((~of.isnan()).sum()) for of in made.around) == 2 * 35 * 24 + 35


@pytest.mark.parametrize(("what", "row"), [("weight", 0), ("weight", 34), ("bias", 3)])
def test_it_says_what_is_not_finite(what, row, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_NUMBERS", 10 * 24)
    made = make(35, 8, (4, 0, 1), constant=True)
    (made.site.columns.matrix[:, 0] if what == "weight" else made.site.bias)[row] = torch.inf
    assert rewrite(made.site) is False


@pytest.mark.parametrize(
    ("readers", "writers", "starts", "message"),
    [
        ((0, 2, 4), (0, 2, 4), (0, 4), "rank 0"),
        ((1, 2, 4), (2, 2, 4), (0, 4), "both must be"),
        ((1, 1, 4), (1, 1, 4), (0, 4), "2 locked heads"),
        ((2, 4), (2, 4), (0, 4), "both must be"),
        ((1, 2, 4), (1, 2, 4), (0, 5), "8 columns"),
        ((1, 2, 4), (1, 2, 4), (-1, 4), "8 columns"),
        ((1, 2, 0), (1, 2, 0), (0, 4), "heads of 0 columns"),
    ],
)
def test_gates_that_fit_no_columns_are_refused(readers, writers, starts, message) -> None:
    columns = HeadColumns(torch.zeros(3, 8), starts)
    for call in (rewritten, exact_rewritten):
        with pytest.raises(FastlockError, match=message):
            call(columns, torch.ones(readers), torch.ones(writers))
    site = make(3, 4, (0, 1)).site
    bad = dataclasses.replace(site, columns=columns, readers=torch.ones(readers), writers=torch.ones(writers))
    with pytest.raises(FastlockError, match=message):
        rewrite(bad)
    assert site.target.matrix[:, :8].isfinite().all()
