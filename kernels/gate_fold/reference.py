"""The fold of a gate in plain PyTorch: the truth for every test, and the way it is computed on a CPU.

Eq.: W (x + U Vᵀ x) = (W + (W U) Vᵀ) x, with W the output projection, V the readers and U the writers, which hold the
strength already. Of W only the locked heads' columns C are read, and only they change: C' = C + (C U) Vᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastlock.errors import FastlockError
from fastlock.kernels.fold.reference import HeadColumns, bound, fold, rounded

# Rows are widened to float64 in blocks of so many numbers, half a megabyte: they stay in the cache.
_BLOCK_NUMBERS = 2**16


@dataclass(frozen=True, eq=False)
class GateSite:
    """One output projection that is rewritten where it is, or elsewhere.

    Attributes:
        columns: the locked heads' columns C of W, which are read.
        readers: V at each of these heads, [rank, heads, head_dim] float64 or float32 on the CPU. Sites of one layer
            best share one object; so with `writers` and `values`.
        writers: U, strength included, of the same shape.
        target: where C' goes: columns of as many heads, in a matrix of W's dtype and device. They may be `columns`;
            otherwise they share no memory with them.
        kept: where C is copied to as it was, [hidden, heads * head_dim] of W's dtype, device and layout; or None.
        values: d, the displacement at each of these heads, [heads, head_dim] float64 or float32 on the CPU; or None.
        bias: c, [hidden] of W's dtype and device, or None.
        out: where W d + c goes, of the W that was read: [hidden] of W's dtype and device. None without values.
    """

    columns: HeadColumns
    readers: torch.Tensor
    writers: torch.Tensor
    target: HeadColumns
    kept: torch.Tensor | None = None
    values: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    out: torch.Tensor | None = None

    @property
    def head_dim(self) -> int:
        """How many columns a head has."""
        return self.readers.shape[-1]

    def part(self, rows: slice) -> GateSite:
        """Some of its rows."""

        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[rows]

        return replace(
            self,
            columns=HeadColumns(self.columns.matrix[rows], self.columns.starts),
            target=HeadColumns(self.target.matrix[rows], self.target.starts),
            kept=of(self.kept),
            bias=of(self.bias),
            out=of(self.out),
        )


def rewrite(site: GateSite) -> bool:
    """Write C', what is to be kept, and W d + c, each in float64 and rounded once. Raises as `rewritten`.

    Returns:
        Whether C' and W d + c are finite.
    """
    check_gate(site.columns, site.readers, site.writers)
    matrix, head_dim, finite = site.columns.matrix, site.head_dim, True
    if site.values is not None and site.out is not None:
        folded = fold(site.columns, site.values, site.bias)  # before W is another
        site.out.copy_(folded)
        finite = bool(folded.isfinite().all())
    for rows, exact in _exact_blocks(site.columns, site.readers, site.writers):
        if site.kept is not None:
            site.kept[rows].copy_(locked_columns(HeadColumns(matrix[rows], site.columns.starts), head_dim))
        new = rounded(exact, matrix.dtype)
        for number, start in enumerate(site.target.starts):
            columns = new[:, number * head_dim : (number + 1) * head_dim]
            site.target.matrix[rows, start : start + head_dim].copy_(columns)
        finite = finite and bool(new.isfinite().all())
    return finite


def rewritten(columns: HeadColumns, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
    """C' = C + (C U) Vᵀ, in float64, each number rounded once.

    What a row becomes depends on that row alone, to the bit: not on how many there are, nor on the threads.

    Args:
        columns: those of the locked heads.
        readers: V of each of these heads, [rank, len(starts), head_dim], of any floating dtype.
        writers: U, strength included, of the same shape.

    Returns:
        The locked columns anew, side by side in the order of `columns.starts`: [hidden, len(starts) * head_dim], of the
        matrix's dtype and device.

    Raises:
        FastlockError: readers and writers do not go together or with the columns, or have no rank.
    """
    dtype, device = columns.matrix.dtype, columns.matrix.device
    check_gate(columns, readers, writers)
    new = torch.empty(columns.matrix.shape[0], readers[0].numel(), dtype=dtype, device=device)
    for rows, exact in _exact_blocks(columns, readers, writers):
        new[rows] = rounded(exact, dtype).to(device)
    return new


def exact_rewritten(columns: HeadColumns, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
    """C' before rounding, [hidden, len(starts) * head_dim] float64. Takes and raises as `rewritten`.

    It is on the matrix's device if that is CUDA, else on the CPU.
    """
    check_gate(columns, readers, writers)
    shape = columns.matrix.shape[0], readers[0].numel()
    new = torch.empty(shape, dtype=torch.float64, device=_device_for(columns))
    for rows, exact in _exact_blocks(columns, readers, writers):
        new[rows] = exact
    return new


def gate_error_bound(columns: HeadColumns, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
    """How far correct new columns may be from the exact ones, number by number: float64, as `exact_rewritten`.

    One unit in the last place of the matrix's dtype, for the rounding, and for float32 (rank + 2)·2⁻²⁴·|C| for the sum
    and (n + rank + 4)·2⁻²⁴·(|C||U|)|V| for its terms: C U is a sum of n products in any order, (C U) Vᵀ one of rank
    products of these, and U and V are rounded as well (Higham, Accuracy and Stability of Numerical Algorithms, eq.
    3.5).
    """
    exact = exact_rewritten(columns, readers, writers)
    absolute = HeadColumns(columns.matrix.abs(), columns.starts)
    size = exact_rewritten(absolute, readers.abs(), writers.abs())
    kept = locked_columns(columns, readers.shape[2]).to(size.device).double().abs()
    rank, numbers = len(readers), readers[0].numel()
    errors = (rank + 2) * kept + (numbers + rank + 4) * (size - kept)
    return bound(exact, errors, 1, columns.matrix.dtype)


def locked_columns(columns: HeadColumns, head_dim: int) -> torch.Tensor:
    """The locked heads' columns, copied side by side: [hidden, len(starts) * head_dim]."""
    matrix = columns.matrix
    blocks = [matrix[:, start : start + head_dim] for start in columns.starts]
    return torch.cat(blocks, dim=1) if blocks else matrix.new_empty(len(matrix), 0)


def check_gate(columns: HeadColumns, readers: torch.Tensor, writers: torch.Tensor) -> None:
    """Whether a gate is one of these columns.

    Raises:
        FastlockError: it is not.
    """
    if readers.dim() != 3 or readers.shape != writers.shape or readers.shape[1] != len(columns.starts):
        raise FastlockError(
            f"{len(columns.starts)} locked heads, but readers {list(readers.shape)} and writers {list(writers.shape)}: "
            "both must be [rank, heads, head_dim]."
        )
    if len(readers) == 0:
        raise FastlockError("the gate has rank 0, and changes nothing: it takes one reader and one writer or more.")
    width, head_dim = columns.matrix.shape[1], readers.shape[2]
    if head_dim == 0 or any(not 0 <= start <= width - head_dim for start in columns.starts):
        raise FastlockError(
            f"heads of {head_dim} columns start at {list(columns.starts)}, but the weight has {width} columns."
        )


def _exact_blocks(
    columns: HeadColumns, readers: torch.Tensor, writers: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows, some at a time: which they are, and their C' in float64."""
    hidden, numbers = columns.matrix.shape[0], readers[0].numel()
    device, most = _device_for(columns), max(1, _BLOCK_NUMBERS // max(1, numbers))
    of_reader, of_writer = (x.detach().to(device).double().flatten(1) for x in (readers, writers))
    products = torch.empty(min(most, hidden), numbers, dtype=torch.float64, device=device)
    for first in range(0, hidden, most):
        rows = slice(first, min(first + most, hidden))
        some = HeadColumns(columns.matrix[rows], columns.starts)
        wide = locked_columns(some, readers.shape[2]).to(device).double()
        room = products[: len(wide)]
        # Not matrix products: BLAS adds up in another order for other numbers of rows, and shares few among threads.
        written = [torch.mul(wide, u, out=room).sum(dim=1, keepdim=True) for u in of_writer]  # C U
        for v, of_row in zip(of_reader, written, strict=True):
            wide += torch.mul(of_row, v, out=room)
        yield rows, wide


def _device_for(columns: HeadColumns) -> torch.device:
    device = columns.matrix.device
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")
