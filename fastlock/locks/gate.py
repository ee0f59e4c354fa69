"""The gate of a lock: what it reads of some heads, and what it writes into them.

At the input x of a locked layer's output projection, x ← x + s·(d + U Vᵀ x): d is the constant part of a lock, U Vᵀ its
gate, which answers to what the heads say. A gate is linear, and folds into the weights:
W (x + s·(d + U Vᵀ x)) = (W + s·(W U) Vᵀ) x + s·W d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_RANK = 256


@dataclass(frozen=True)
class Gate:
    """The gate of one layer, over its locked heads alone.

    Attributes:
        heads: the locked heads of this layer, ascending.
        readers: V, [rank, len(heads), head_dim] float64 on the CPU.
        writers: strength · U, [rank, len(heads), head_dim] float64 on the CPU.
    """

    heads: tuple[int, ...]
    readers: torch.Tensor
    writers: torch.Tensor

    @property
    def rank(self) -> int:
        """How many pairs of a reader and a writer there are."""
        return self.readers.shape[0]

    @property
    def head_dim(self) -> int:
        """How many numbers a head has."""
        return self.readers.shape[2]

    def dense(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """V and strength · U over all heads, zero off the locked ones: [width, rank] float64 each.

        Args:
            width: num_heads * head_dim.
        """
        return _dense(self.readers, self.heads, width), _dense(self.writers, self.heads, width)


def _dense(rows: torch.Tensor, heads: tuple[int, ...], width: int) -> torch.Tensor:
    rank, _, head_dim = rows.shape
    whole = torch.zeros(width, rank, dtype=torch.float64, device="cpu")
    for i, head in enumerate(heads):
        whole[head * head_dim : (head + 1) * head_dim] = rows[:, i].T
    return whole
