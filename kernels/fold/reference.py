"""The fold in plain PyTorch: the truth for every test.

Eq.: (x + d) Wᵀ + c = x Wᵀ + (c + W d), with W the output projection, d the displacement, c the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# On a CPU, rows are widened to float64 in blocks of so many numbers: a megabyte, which stays in the cache.
_BLOCK_NUMBERS = 2**17
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

    @property
    def hidden(self) -> int:
        """How many rows there are."""
        return self.matrix.shape[0]

    def in_rows(self, rows: slice) -> HeadColumns:
        """Those in some rows, in the same memory."""
        return HeadColumns(self.matrix[rows], self.starts)


@dataclass(frozen=True, eq=False)
class Room:
    """Memory for a block of numbers, which folds can use one after the other: it is slow to get anew.

    Attributes:
        narrow, wide: [numbers], float32 and float64.
    """

    narrow: torch.Tensor
    wide: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, rows: int, head_dim: int) -> Room:
        """Room for so many rows of one head; on a CPU for as many as the thread that asks should take at a time."""
        numbers = rows * head_dim
        if device.type == "cpu":
            most = _BLOCK_NUMBERS if torch.get_num_threads() == 1 else _SHARED_NUMBERS - 1
            numbers = max(head_dim, min(numbers, most))
        return cls(*(torch.empty(numbers, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)))

    def products(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Each of some rows times the values, [rows, columns] float64, in this room.

        By way of float32, which is exact: from float16 to float64 directly, torch takes twice as long.
        """
        wide = self.wide[: rows.numel()].view(rows.shape)
        if rows.dtype != torch.float64:
            rows = wide.copy_(self.narrow[: rows.numel()].view(rows.shape).copy_(rows))
        return torch.mul(rows.to(wide.device), values, out=wide)


def fold(
    columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None = None, room: Room | None = None
) -> torch.Tensor:
    """b = W d + c over the locked head columns only, in float64, rounded once.

    Args:
        columns: those of the locked heads.
        values: the displacement d of each of these heads, [len(starts), head_dim], of any floating dtype.
        bias: c, [hidden], or None.
        room: to work in; by default it gets its own.

    Returns:
        b, [hidden], of the matrix's dtype and device.
    """
    exact = exact_fold(columns, values, bias, room)
    return rounded(exact, columns.matrix.dtype).to(columns.matrix.device)


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


def exact_fold(
    columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None = None, room: Room | None = None
) -> torch.Tensor:
    """The fold before rounding: b, [hidden] float64, on the matrix's device if that is CUDA, else on the CPU."""
    matrix = columns.matrix
    device = matrix.device if matrix.device.type in ("cpu", "cuda") else torch.device("cpu")
    b = torch.zeros(matrix.shape[0], dtype=torch.float64, device=device)
    room = room or Room.on(device, len(b), values.shape[1])
    for run, of_run in _runs(columns, values.to(device), len(room.wide) // values.shape[1]):
        heads = len(of_run)
        sums = torch.empty(len(b), heads, dtype=torch.float64, device=device)
        block = max(1, len(room.wide) // of_run.numel())
        for rows, out in zip(run.split(block), sums.split(block), strict=True):
            # Not a matrix product: BLAS would share these few rows among threads, too.
            products = room.products(rows, of_run.flatten())
            torch.sum(products.view(len(rows), heads, -1), dim=2, out=out)
        for of_head in sums.unbind(dim=1):
            b.add_(of_head)
    return b if bias is None else b + bias.detach().to(device).double()


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


def _runs(columns: HeadColumns, values: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The locked heads that lie side by side, up to so many at a time.

    Yields:
        Their columns, [hidden, heads * head_dim], and their values, [heads, head_dim].
    """
    head_dim, first = values.shape[1], 0
    for after in range(1, len(values) + 1):
        beside = after < len(values) and columns.starts[after] == columns.starts[after - 1] + head_dim
        if not beside or after - first == most:
            start = columns.starts[first]
            yield columns.matrix[:, start : start + (after - first) * head_dim], values[first:after]
            first = after
