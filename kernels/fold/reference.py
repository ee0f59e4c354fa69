"""The fold in plain PyTorch: the truth for every test.

Eq.: (x + d) Wᵀ + c = x Wᵀ + (c + W d), with W the output projection, d the displacement, c the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# On a CPU, rows are widened to float64 in blocks of so many numbers: half a megabyte, which stays in the cache.
_BLOCK_NUMBERS = 2**16
# From so many on (its GRAIN_SIZE), torch shares them among its threads. To wait for those takes longer than the sums,
# and on busy cores longer than all the rest: `fastlock.fold` has threads that do not wait for each other.
_SHARED_NUMBERS = 2**15


@dataclass(frozen=True, eq=False)
class HeadColumns:
    """The columns of an output projection that belong to its locked heads: all of W that a fold reads.

    Every kind of projection says where they are in a matrix: in memory in W itself, on disk in what was read of it.

    Attributes:
        matrix: [hidden, columns], of any floating dtype, device and strides.
        starts: the first column in the matrix of each locked head.
    """

    matrix: torch.Tensor
    starts: tuple[int, ...]

    @classmethod
    def in_projection(cls, weight: torch.Tensor, heads: Sequence[int], head_dim: int) -> HeadColumns:
        """Those of a whole W, [hidden, num_heads * head_dim], for heads counted from 0."""
        return cls(weight.detach(), tuple(head * head_dim for head in heads))

    @classmethod
    def side_by_side(cls, columns: torch.Tensor, head_dim: int) -> HeadColumns:
        """Those of a matrix that has the locked heads alone, side by side: [hidden, len(heads) * head_dim]."""
        return cls(columns.detach(), tuple(range(0, columns.shape[1], head_dim)))


def fold(columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """b = W d + c over the locked head columns only, in float64, rounded once.

    Args:
        columns: those of the locked heads.
        values: the displacement d of each of these heads, [len(starts), head_dim], of any floating dtype.
        bias: c, [hidden], or None.

    Returns:
        b, [hidden], of the matrix's dtype and device.
    """
    return rounded(exact_fold(columns, values, bias), columns.matrix.dtype).to(columns.matrix.device)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to the nearest of a smaller dtype, once: `.to` goes through float32, and rounds twice.

    The step through float32 is rounded to odd, which keeps whatever decides the second one (Boldo and Melquiond,
    Emulation of FMA and Correctly Rounded Sums, 2008).
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    nearest = x.float()
    beyond = (nearest.double().abs() > x.abs()).int()
    inexact = (nearest.double() != x).int()
    return ((nearest.view(torch.int32) - beyond) | inexact).view(torch.float32).to(dtype)


def exact_fold(columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The fold before rounding: b, [hidden] float64, on the matrix's device if that is CUDA, else on the CPU."""
    matrix = columns.matrix
    device = matrix.device if matrix.device.type in ("cpu", "cuda") else torch.device("cpu")
    b = torch.zeros(matrix.shape[0], dtype=torch.float64, device=device)
    narrow, wide = _room(len(b), values.shape[1], device)
    for of_head, value in _by_head(columns, values.to(device)):
        for sums, rows in zip(b.split(len(wide)), of_head.split(len(wide)), strict=True):
            # Not a matrix product: BLAS would share these few rows among threads, too.
            sums.add_(_products(rows, value, narrow[: len(rows)], wide[: len(rows)]).sum(dim=1))
    return b if bias is None else b + bias.detach().to(device).double()


def _room(rows: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a block of rows of one head, in float32 and in float64."""
    if device.type == "cpu":
        numbers = _BLOCK_NUMBERS if torch.get_num_threads() == 1 else _SHARED_NUMBERS - 1
        rows = min(rows, numbers // head_dim)
    size = (max(1, rows), head_dim)
    return torch.empty(size, dtype=torch.float32, device=device), torch.empty(size, dtype=torch.float64, device=device)


def _products(rows: torch.Tensor, value: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Each row times the value, in `wide`.

    By way of `narrow`, which is exact: from float16 to float64 directly, torch takes twice as long.
    """
    if rows.dtype != torch.float64:
        rows = wide.copy_(narrow.copy_(rows))
    return torch.mul(rows.to(wide.device), value, out=wide)


def error_bound(columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """How far a correct fold may be from the exact one, number by number: [hidden] float64, where `exact_fold` is.

    One unit in the last place of the matrix's dtype, for the rounding, and n·2⁻²⁴·(|W||d| + |c|) for a sum of n
    float32 products in any order (Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5).
    """
    b = exact_fold(columns, values, bias)
    size = magnitude(columns, values) + (0 if bias is None else bias.detach().to(b.device).double().abs())
    return bound(b, size, values.numel() + 1, columns.matrix.dtype)


def magnitude(columns: HeadColumns, values: torch.Tensor) -> torch.Tensor:
    """|W||d|, [hidden] float64, where `exact_fold` is."""
    return exact_fold(HeadColumns(columns.matrix.abs(), columns.starts), values.abs())


def bound(b: torch.Tensor, size: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """The bound of `error_bound` from its parts: the exact fold b, |W||d| + |c|, and the number of terms."""
    info = torch.finfo(dtype)
    unit = torch.exp2(torch.floor(torch.log2(b.abs().clamp(min=info.tiny)))) * info.eps
    return unit + terms * 2.0**-24 * size


def _by_head(columns: HeadColumns, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each locked head's columns, [hidden, head_dim], and its values, [head_dim]."""
    for start, value in zip(columns.starts, values, strict=True):
        yield columns.matrix[:, start : start + len(value)], value
