"""The locked columns of a quantised projection, dequantised some rows at a time.

In float64 they are up to sixteen times as large as in the file. To write all of that to memory and read it again takes
longer than to compute it: a head or so is folded as soon as it is there. In smaller parts, threads would wait longer
for Python's lock than the cache saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastlock.checkpoints.quantised.site_tensors import Dequantised
from fastlock.kernels.fold.reference import HeadColumns

# How many numbers are dequantised at a time: 8 MB.
_NUMBERS = 2**20


@dataclass(frozen=True, eq=False)
class DequantisedColumns:
    """The columns of the locked heads.

    Attributes:
        heads: what gives those of each, [rows, head_dim] float64.
        hidden: how many rows there are.
        head_dim: how many columns a head has.
    """

    heads: Sequence[Dequantised]
    hidden: int
    head_dim: int

    def in_rows(self, rows: slice) -> HeadColumns:
        """Those in some rows, side by side."""
        return HeadColumns.side_by_side(torch.cat([of_head(rows) for of_head in self.heads], dim=1), self.head_dim)

    def exact_fold(self, values: torch.Tensor) -> torch.Tensor:
        """W d, [hidden] float64, as `reference.exact_fold` computes it.

        Args:
            values: the displacement d of each head, [len(heads), head_dim] float64.
        """
        b = torch.zeros(self.hidden, dtype=torch.float64)
        height = max(1, _NUMBERS // self.head_dim)
        for top in range(0, self.hidden, height):
            rows = slice(top, top + height)
            for of_head, d in zip(self.heads, values, strict=True):
                b[rows] += of_head(rows).mul_(d).sum(dim=1)
        return b
