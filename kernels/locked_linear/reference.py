"""The projection with a lock per row in plain PyTorch: what it is computed from, and y = (x + s d[lock]) Wᵀ + c."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from fastlock.kernels.locked_linear.tiles import bucket


def layout_of(weight: torch.Tensor) -> str:
    """What of W, [hidden, width], is contiguous in memory: its "rows", its "columns" (GPT-2's Conv1D), or "none"."""
    return "rows" if weight.stride(1) == 1 else "columns" if weight.stride(0) == 1 else "none"


@dataclass(frozen=True, eq=False)
class Inputs:
    """What it is computed from; all on one device.

    Attributes:
        x: [rows, width], of the same dtype as weight and bias.
        weight: W, [hidden, width].
        bias: c, [hidden], or None.
        heads: the column of `slots` for each head, -1 where no lock shifts it; [num_heads] int32, where width =
            num_heads * head_dim.
        slots: the row of `values` for each lock and column, -1 where the lock does not shift that head; [num_locks,
            columns] int32.
        values: displacements at strength 1, [n, head_dim] float32.
        folds: W d of each lock at strength 1, [num_locks, hidden] float32.
        lock_of_row: the lock of each entry, -1 for none; [entries] int32. Each entry serves rows / entries rows.
        strength_of_row: the strength of each entry, [entries] float32.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    heads: torch.Tensor
    slots: torch.Tensor
    values: torch.Tensor
    folds: torch.Tensor
    lock_of_row: torch.Tensor
    strength_of_row: torch.Tensor

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def rows_per_entry(self) -> int:
        return self.rows // self.lock_of_row.shape[0]

    @property
    def head_dim(self) -> int:
        return self.values.shape[1]

    @property
    def transposed(self) -> bool:
        """Whether each column of W is contiguous in memory, not each row."""
        return layout_of(self.weight) == "columns"

    def shape(self) -> tuple[object, ...]:
        """What decides how inputs are computed."""
        x, weight = self.x, self.weight
        return x.device, x.dtype, *weight.shape, layout_of(weight), self.head_dim, bucket(self.rows)


def by_torch(inputs: Inputs) -> torch.Tensor:
    """y by torch alone, on any device and of any dtype: the projection, then the folds added to the locked rows.

    16-bit results are added to in float32, and rounded once more. Rows without a lock are the plain projection's. A
    lock that does not exist gives NaN, and so does a negative strength.

    Returns:
        y, [rows, hidden] of x's dtype.
    """
    y = functional.linear(inputs.x, inputs.weight, inputs.bias)
    lock = inputs.lock_of_row
    if not inputs.rows:
        return y
    there = (lock >= 0) & (lock < inputs.folds.shape[0]) & (inputs.strength_of_row >= 0)
    strength = torch.where(there, inputs.strength_of_row, float("nan"))
    fold = strength[:, None] * inputs.folds[torch.where(there, lock, 0)]  # [entries, hidden] float32
    each = y.view(lock.shape[0], -1, y.shape[1])
    shifted = (each + fold[:, None]).to(y.dtype)  # with the float32 folds, 16-bit results become float32
    return torch.where((lock != -1)[:, None, None], shifted, each).view(y.shape)
