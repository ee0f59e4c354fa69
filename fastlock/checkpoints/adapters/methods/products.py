"""The products in float64 that low-rank methods are made of."""

from __future__ import annotations

import torch

from fastlock.checkpoints.adapters.methods.method import AdaptedSite

# From so many on (its GRAIN_SIZE), torch shares numbers among its threads, for which it waits longer than it computes.
_SHARED_NUMBERS = 2**15


def displaced(at: AdaptedSite, matrix: torch.Tensor) -> torch.Tensor:
    """M d of a matrix that the projection's input meets, [rows, num_heads * head_dim]: [rows] float64.

    Only the locked columns are read.
    """
    values, head_dim = at.displacement.values.flatten(), at.displacement.head_dim
    locked = [matrix[:, head * head_dim : (head + 1) * head_dim] for head in at.displacement.heads]
    return times(torch.cat(locked, dim=1), values)


def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """M v, [rows] float64, of a matrix [rows, n] and v, [n] float64."""
    rows = max(1, (_SHARED_NUMBERS - 1) // max(1, len(vector)))
    return torch.cat([(some * vector).sum(1) for some in matrix.split(rows)])
