"""The products of low-rank methods, against sums that are exact."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlock.checkpoints.adapters.methods.products import displaced, times
from fastlock.locks.lock import Displacement

_SHARED_NUMBERS = 2**15  # at::internal::GRAIN_SIZE: from so many on, torch's threads wait for each other


class Largest(TorchDispatchMode):
    """How many numbers the largest operation that computes had to do with."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.cat.default:
            sizes = [value.numel() for value in (*args, result) if isinstance(value, torch.Tensor)]
            self.numbers = max(self.numbers, *sizes)
        return result


def exact(matrix: torch.Tensor, vector: torch.Tensor) -> list[float]:
    return [math.fsum(a * b for a, b in zip(row, vector.tolist(), strict=True)) for row in matrix.tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 16), (3, 40_001), (1, 1), (5, 0), (0, 7)])
def test_times_is_the_sum_of_each_row(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    matrix = torch.randn(rows, columns, generator=generator).to(dtype)
    vector = torch.randn(columns, generator=generator, dtype=torch.float64)
    expected = torch.tensor(exact(matrix, vector), dtype=torch.float64)
    torch.testing.assert_close(times(matrix, vector), expected, rtol=0, atol=1e-13 * max(1, columns) ** 0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_displaced_reads_the_locked_columns_alone(transposed: bool) -> None:
    generator, heads, head_dim = torch.Generator().manual_seed(1), (1, 2, 7), 32
    values = torch.randn(len(heads), head_dim, generator=generator, dtype=torch.float64)
    matrix = torch.randn(1000, 8 * head_dim, generator=generator).bfloat16()
    locked = matrix.view(1000, 8, head_dim)[:, list(heads)].flatten(1)
    expected = torch.tensor(exact(locked, values.flatten()), dtype=torch.float64)
    for head in (0, 3, 4, 5, 6):
        matrix[:, head * head_dim : (head + 1) * head_dim] = math.nan
    at: Any = SimpleNamespace(displacement=Displacement(heads, values))
    stored = matrix.t().contiguous().t() if transposed else matrix
    torch.testing.assert_close(displaced(at, stored), expected, rtol=0, atol=1e-12)


def test_no_operation_is_large_enough_for_torch_to_share_it() -> None:
    matrix, vector = torch.zeros(4096, 16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.float64)
    with Largest() as largest:
        times(matrix, vector)
    assert 0 < largest.numbers < _SHARED_NUMBERS
