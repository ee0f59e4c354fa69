"""The fold in plain PyTorch, and the relocked forward without folding: the truth for every test.

Eq.: (x + d) Wᵀ + c = x Wᵀ + (c + W d), with W the output projection, d the displacement, c the bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastlock.locks.lock import Displacement, Lock, strength_for
from fastlock.models.sites import sites_for

# On a CPU, rows are widened to float64 in blocks that stay in the cache.
_CACHED_ROWS = 512


def fold(weight: torch.Tensor, displacement: Displacement, bias: torch.Tensor | None = None) -> torch.Tensor:
    """b = W d + c over the locked head columns only, in float64, rounded once.

    Args:
        weight: the output projection W, [hidden, num_heads * head_dim], any floating dtype, device and strides.
        displacement: the locked heads and their values.
        bias: the bias c that is there already, [hidden], or None.

    Returns:
        b, [hidden], of the weight's dtype and device.
    """
    return _rounded(exact_fold(weight, displacement, bias), weight.dtype).to(weight.device)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to the nearest of a smaller dtype, once: `.to` goes through float32, and so rounds twice.

    The step through float32 is rounded to odd, which keeps whatever decides the second one (Boldo and Melquiond,
    Emulation of FMA and Correctly Rounded Sums, 2008).
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    nearest = x.float()
    beyond = (nearest.double().abs() > x.abs()).int()
    inexact = (nearest.double() != x).int()
    return ((nearest.view(torch.int32) - beyond) | inexact).view(torch.float32).to(dtype)


def exact_fold(weight: torch.Tensor, displacement: Displacement, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The fold before rounding: b, [hidden] float64, on the weight's device where that has float64, else the CPU."""
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    b = torch.zeros(weight.shape[0], dtype=torch.float64, device=device)
    block = _CACHED_ROWS if device.type == "cpu" else max(1, len(b))
    for columns, value in _locked_columns(weight, displacement):
        for first in range(0, len(b), block):
            rows = slice(first, first + block)
            # Not a matrix product: BLAS would share these few rows among threads, which takes longer than the sums.
            b[rows] += (columns[rows].to(device).double() * value.to(device)).sum(dim=1)
    return b if bias is None else b + bias.detach().to(device).double()


def error_bound(weight: torch.Tensor, displacement: Displacement, bias: torch.Tensor | None = None) -> torch.Tensor:
    """How far a right fold may be from the exact one, number by number: [hidden] float64, where `exact_fold` is.

    One unit in the last place of the weight's dtype, for the rounding, and n·2⁻²⁴·(|W||d| + |c|) for a sum of n
    float32 products in any order (Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5).
    """
    b = exact_fold(weight, displacement, bias)
    size = magnitude(weight, displacement) + (0 if bias is None else bias.detach().to(b.device).double().abs())
    return bound(b, size, displacement.values.numel() + 1, weight.dtype)


def magnitude(weight: torch.Tensor, displacement: Displacement) -> torch.Tensor:
    """|W||d|, [hidden] float64, where `exact_fold` is."""
    absolute = Displacement(displacement.heads, displacement.values.abs())
    return exact_fold(weight.detach().abs(), absolute)


def bound(b: torch.Tensor, size: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """The bound of `error_bound` from its parts: the exact fold b, |W||d| + |c|, and the number of terms."""
    info = torch.finfo(dtype)
    unit = torch.exp2(torch.floor(torch.log2(b.abs().clamp(min=info.tiny)))) * info.eps
    return unit + terms * 2.0**-24 * size


def _locked_columns(weight: torch.Tensor, displacement: Displacement) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each locked head's columns of W, [hidden, head_dim], and its values, [head_dim]."""
    head_dim = displacement.values.shape[1]
    for head, value in zip(displacement.heads, displacement.values, strict=True):
        yield weight.detach()[:, head * head_dim : (head + 1) * head_dim], value


@contextlib.contextmanager
def unfolded(model: nn.Module, lock: Lock, strength: float | None = None) -> Iterator[nn.Module]:
    """Run the model with d added to the input of each locked output projection; nothing is folded.

    This is what a relocked model must equal, at every position. It touches no weight.
    """
    displacements = lock.displacement(strength_for(lock, strength))
    handles = []
    try:
        for site in sites_for(model, lock):
            d = displacements[site.layer].dense(site.num_heads * site.head_dim)

            def shift(module: nn.Module, args: tuple[torch.Tensor], d: torch.Tensor = d) -> tuple[torch.Tensor]:
                return (args[0] + d.to(args[0]),)

            handles.append(site.module.register_forward_pre_hook(shift))
        yield model
    finally:
        for handle in handles:
            handle.remove()
