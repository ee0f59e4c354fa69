"""The products in float64 that low-rank methods are made of."""

from __future__ import annotations

import torch

from fastlock.checkpoints.adapters.methods.method import AdaptedSite
from fastlock.kernels.fold.reference import HeadColumns, exact_fold


def displaced(at: AdaptedSite, matrix: torch.Tensor) -> torch.Tensor:
    """M d of a matrix that the projection's input meets, [rows, num_heads * head_dim]: [rows] float64.

    Only the locked columns are read.
    """
    if not len(matrix):
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    displacement = at.displacement
    return exact_fold(HeadColumns.in_projection(matrix, displacement.heads, displacement.head_dim), displacement.values)


def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """M v, [rows] float64, of a matrix [rows, n] and v, [n] float64."""
    if not len(vector):
        return torch.zeros(len(matrix), dtype=torch.float64, device="cpu")
    return exact_fold(HeadColumns(matrix, (0,)), vector[None])
