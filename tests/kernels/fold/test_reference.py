"""The truth itself: the fold's rounding and its bound."""

from fractions import Fraction

import pytest
import torch

from fastlock.kernels.fold import reference
from fastlock.kernels.fold.reference import HeadColumns, error_bound, exact_fold, fold


@pytest.mark.parametrize(
    ("dtype", "x", "nearest"),
    [
        (torch.float16, 1 + 2**-11 + 2**-40, 1 + 2**-10),
        (torch.float16, 1 + 2**-11 - 2**-40, 1.0),
        (torch.float16, 1 + 2**-11, 1.0),
        (torch.bfloat16, 1 + 2**-8 + 2**-40, 1 + 2**-7),
        (torch.bfloat16, -(1 + 2**-8 + 2**-40), -(1 + 2**-7)),
        (torch.bfloat16, 1 + 2**-7 + 2**-8 - 2**-40, 1 + 2**-7),
        (torch.bfloat16, 0.0, 0.0),
        (torch.float16, 2**-25 + 2**-60, 2**-24),
        (torch.float16, 1e6, float("inf")),
        (torch.bfloat16, 1e300, float("inf")),
    ],
)
def test_it_rounds_once(dtype: torch.dtype, x: float, nearest: float) -> None:
    """Just off the middle of two numbers, where rounding to float32 first would land on the middle."""
    weight = torch.ones(1, 1, dtype=dtype)
    assert fold(HeadColumns(weight, (0,)), torch.tensor([[x]], dtype=torch.float64)).item() == nearest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_rounds_to_the_nearest_everywhere(dtype: torch.dtype) -> None:
    x = torch.randn(20_000, dtype=torch.float64)
    result = reference.rounded(x, dtype)
    bits = result.view(torch.int16)
    for neighbour in (bits + 1, bits - 1):
        other = neighbour.view(dtype).double()
        assert ((result.double() - x).abs() <= (other - x).abs()).all()
    assert reference.rounded(torch.tensor([float("nan")], dtype=torch.float64), dtype).isnan().all()


def test_the_fold_against_exact_arithmetic() -> None:
    """Fractions have no rounding at all."""
    weight, values = torch.randn(3, 8), torch.randn(1, 2, dtype=torch.float64)
    bias = torch.randn(3)
    found = exact_fold(HeadColumns.in_projection(weight, (2,), 2), values, bias)
    for row in range(3):
        products = (Fraction(weight[row, 4 + i].item()) * Fraction(values[0, i].item()) for i in range(2))
        assert found[row].item() == pytest.approx(float(sum(products, Fraction(bias[row].item()))), rel=1e-15)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_blocks_and_the_way_to_float64_change_no_bit(dtype: torch.dtype, threads: int) -> None:
    """As many rows as fill several blocks, and some more; numbers of every size, subnormal ones too."""
    weight = (torch.randn(1283, 3 * 128) * torch.exp2(torch.randint(-20, 10, (1283, 1)))).to(dtype)
    values = torch.randn(2, 128, dtype=torch.float64)
    expected = torch.zeros(1283, dtype=torch.float64)
    for head, value in zip((0, 2), values, strict=True):
        expected += (weight[:, head * 128 : (head + 1) * 128].double() * value).sum(dim=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = exact_fold(HeadColumns.in_projection(weight, (0, 2), 128), values)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))


def test_the_bound_is_near_one_unit_and_grows_with_cancellation() -> None:
    weight = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    values = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    exactly, cancelled = error_bound(HeadColumns(weight, (0,)), values)
    assert 2**-22 < exactly < 2**-20
    assert 2**-23 < cancelled < 2**-21
    assert (error_bound(HeadColumns(weight.half(), (0,)), values) > 2**-10).sum() == 1
