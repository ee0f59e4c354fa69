"""The fold of a gate, W' = W + (W U) Vᵀ over the locked head columns, of many sites at once, by whatever suits them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastlock.errors import DamagedError, FastlockError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold import reference


@dataclass(frozen=True, eq=False)
class GateFold:
    """What the fold of one site's gate takes.

    Attributes:
        columns: the locked heads' columns C of W, float16, bfloat16, float32 or float64.
        readers: V at each of these heads, [rank, len(heads), head_dim] float64 on the CPU.
        writers: U, times the strength, of the same shape, float64 on the CPU.
        name: of the site, for messages.
    """

    columns: HeadColumns
    readers: torch.Tensor
    writers: torch.Tensor
    name: str

    @property
    def head_dim(self) -> int:
        """How many columns a head has."""
        return self.readers.shape[-1]


def gate_fold(folds: Sequence[GateFold]) -> list[torch.Tensor]:
    """The locked columns of each site anew, C' = C + (C U) Vᵀ, rounded once. What was read is left as it is.

    Returns:
        C' of each site, [hidden, heads * head_dim], of the columns' dtype and device: the heads side by side, in the
        order of the columns' starts.

    Raises:
        DamagedError: new columns are not finite, as the weights hold NaN or infinities.
        FastlockError: they are not finite, as the strength is too large for the dtype; or a gate does not fit its
            columns.
    """
    with torch.inference_mode(False), torch.no_grad():
        results = [reference.rewritten(f.columns, f.readers, f.writers) for f in folds]
    for f, new in zip(folds, results, strict=True):
        if not _is_finite(new):
            raise _not_finite(f)
    return results


def _is_finite(new: torch.Tensor) -> bool:
    # In float64 the sum of finite numbers cannot overflow, unless they are float64 themselves.
    return math.isfinite(new.sum(dtype=torch.float64).item()) or bool(new.isfinite().all())


def _not_finite(f: GateFold) -> FastlockError:
    """The error of new columns that are not finite."""
    if not reference.locked_columns(f.columns, f.head_dim).isfinite().all():
        return DamagedError(
            f"{f.name}: its rewritten weights are not finite: its locked columns hold NaN or infinite weights. Check "
            "the model, or download the checkpoint again."
        )
    return FastlockError(
        f"{f.name}: its rewritten weights are not finite in {f.columns.matrix.dtype}: the strength is too large for "
        "this dtype. Lower it."
    )
