"""The fold on a CPU by BLAS, proven number by number to round as the reference does.

BLAS sums in another order than the reference. Their sums differ in the last bits, and their results only where the
middle between two numbers of the dtype lies between the two sums. How far those can be apart is bounded. Where all that
lies within the bound rounds alike, so do both; the few other rows are left to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastlock.kernels.fold import reference
from fastlock.kernels.fold.reference import HeadColumns, rounded

# Numbers are widened in blocks of so many, which stay in the cache.
_BLOCK_NUMBERS = 2**17
_UNIT = 2.0**-53  # of rounding, in float64
# More than the rounding of the steps by which the bound is taken.
_SLACK = 1 + 2.0**-10
# Where more than this part of the rows is in doubt, the reference folds all.
_MANY = 1 / 16


@dataclass(frozen=True, eq=False)
class Room:
    """Memory for one block after another: it is slow to get anew.

    Attributes:
        narrow, middle, wide: [numbers], of the matrix's dtype, float32 and float64.
    """

    narrow: torch.Tensor
    middle: torch.Tensor
    wide: torch.Tensor

    @classmethod
    def for_blocks(cls, dtype: torch.dtype, least: int) -> Room:
        """Room for a block of a matrix of this dtype, of at least so many numbers."""
        numbers = max(least, _BLOCK_NUMBERS)
        return cls(*(torch.empty(numbers, dtype=each, device="cpu") for each in (dtype, torch.float32, torch.float64)))


def applies_to(matrix: torch.Tensor) -> bool:
    """Whether `fold` can fold it, in this thread: torch's threads would wait for each other after every block."""
    return (
        matrix.device.type == "cpu"
        and matrix.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and 1 in matrix.stride()
        and torch.get_num_threads() == 1
    )


def fold(
    columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None = None, room: Room | None = None
) -> torch.Tensor:
    """What `reference.fold` gives, bit for bit, and sooner, where `applies_to` says so.

    With u = 2⁻⁵³ and n numbers in d, every float64 sum of W d + c, in whatever order it is taken, is within
    γ (|W||d| + |c|) of the exact one, where γ = (n + 2) u / (1 - (n + 2) u) (Higham, Accuracy and Stability of
    Numerical Algorithms, eq. 3.5). |w||d| is at most ‖w‖ ‖d‖ for a row w (Cauchy and Schwarz), and ‖w‖ at most the
    norm of all rows of its block. What underflows in float64 is beside that nothing, unless the result is zero: those
    are left to the reference.

    Args:
        columns: those of the locked heads.
        values: the displacement d of each of these heads, [len(starts), head_dim], of any floating dtype.
        bias: c, [hidden], or None.
        room: to work in, which has `least_room` at least; by default it gets its own.

    Returns:
        b, [hidden], of the matrix's dtype and device.
    """
    d = values.detach().double().flatten()
    room = room or Room.for_blocks(columns.matrix.dtype, least_room(columns))
    sums, sizes = (_by_rows if columns.matrix.stride(1) == 1 else _by_columns)(columns, d, room)
    if bias is not None:
        c = bias.detach().double()
        sums, sizes = sums + c, sizes + c.abs()
    radius = sizes * ((2 * len(d) + 8) * _UNIT * _SLACK)
    ends = rounded(torch.stack((sums - radius, sums + radius)), columns.matrix.dtype)
    lowest, highest = ends[0], ends[1]
    # A zero has the sign of the sum. What is not a number equals nothing.
    doubtful = ((lowest != highest) | (lowest == 0)).nonzero().flatten()
    if len(doubtful) > _MANY * len(sums):
        return reference.fold(columns, values, bias)
    if len(doubtful):
        rows = replace(columns, matrix=columns.matrix[doubtful])
        lowest[doubtful] = reference.fold(rows, values, None if bias is None else bias[doubtful])
    return lowest


def least_room(columns: HeadColumns) -> int:
    """How many numbers the smallest block may have: those of one row, or of one column."""
    return columns.matrix.shape[1 if columns.matrix.stride(1) == 1 else 0]


def _by_rows(columns: HeadColumns, d: torch.Tensor, room: Room) -> tuple[torch.Tensor, torch.Tensor]:
    """W d, and what |W||d| is at most, [hidden] float64 each, of a matrix whose rows are in one piece each."""
    matrix, width = columns.matrix, len(d)
    block = len(room.wide) // width
    sums, squares = torch.empty(len(matrix), dtype=torch.float64, device="cpu"), list[torch.Tensor]()
    for rows, out in zip(matrix.split(block), sums.split(block), strict=True):
        narrow = _gathered(rows, columns.starts, width, room)
        wide = _widened(narrow, room).view(len(rows), width)
        torch.mv(wide, d, out=out)
        squares.append(torch.dot(wide.flatten(), wide.flatten()))
    sizes = torch.stack(squares).sqrt() * torch.linalg.vector_norm(d)
    return sums, sizes.repeat_interleave(block)[: len(sums)]


def _by_columns(columns: HeadColumns, d: torch.Tensor, room: Room) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a matrix whose columns are in one piece each."""
    matrix, head_dim = columns.matrix.t(), len(d) // len(columns.starts)
    block = len(room.wide) // matrix.shape[1]
    sums, square = (torch.zeros(size, dtype=torch.float64, device="cpu") for size in (matrix.shape[1], ()))
    for start, of_head in zip(columns.starts, d.split(head_dim), strict=True):
        for some, values in zip(matrix[start : start + head_dim].split(block), of_head.split(block), strict=True):
            wide = _widened(some, room).view(some.shape)
            sums.addmv_(wide.t(), values)
            square += torch.dot(wide.flatten(), wide.flatten())
    return sums, (square.sqrt() * torch.linalg.vector_norm(d)).expand_as(sums)


def _gathered(rows: torch.Tensor, starts: tuple[int, ...], width: int, room: Room) -> torch.Tensor:
    """The locked columns of some rows side by side, [rows, width]: where they are, or copied, which keeps them so."""
    head_dim = width // len(starts)
    if starts == tuple(range(starts[0], starts[0] + width, head_dim)):
        return rows[:, starts[0] : starts[0] + width]
    narrow = room.narrow[: len(rows) * width].view(len(rows), len(starts), head_dim)
    if any(start % head_dim for start in (*starts, rows.shape[1])):
        pieces = [rows[:, start : start + head_dim] for start in starts]
        return torch.stack(pieces, dim=1, out=narrow).view(len(rows), width)
    heads = torch.tensor([start // head_dim for start in starts])
    # Copies by slices take five times as long.
    torch.index_select(rows.unflatten(1, (-1, head_dim)), 1, heads, out=narrow)
    return narrow.view(len(rows), width)


def _widened(narrow: torch.Tensor, room: Room) -> torch.Tensor:
    """A matrix in float64, which is exact, [numbers].

    From float16 by way of float32: directly, torch takes twice as long.
    """
    wide = room.wide[: narrow.numel()]
    if narrow.dtype == torch.float16:
        narrow = room.middle[: narrow.numel()].view(narrow.shape).copy_(narrow)
    wide.view(narrow.shape).copy_(narrow)
    return wide
