"""The fold of an adapter in plain PyTorch: the truth for every test, and the way it is computed on a CPU.

Eq.: y = W x + c + s·(B A x + β), so (x + d) gives y + W d + s·B(A d): Hu et al., LoRA, 2021, eq. 3, and the paper's
b = W d. Only the locked heads' columns of A are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastlock.kernels.fold.reference import HeadColumns, bound, exact_fold, magnitude, rounded


@dataclass(frozen=True, eq=False)
class LowRankSite:
    """One low-rank adapter at one layer's output projection.

    Attributes:
        columns: the locked heads' columns of A, in a matrix [rank, width] of any floating dtype, device and strides.
        values: d, the displacement at each of these heads, [heads, head_dim] float64 or float32 on the CPU. Sites of
            one layer best share one object.
        up: B, [hidden, rank], of A's dtype and device.
        scale: s.
        shared: what all adapters of the layer have in common, such as W d or W d + c, not yet rounded: [hidden]
            float32 for the kernel, float32 or float64 for the reference, on A's device.
        bias: β, [hidden] of A's dtype and device, or None.
    """

    columns: HeadColumns
    values: torch.Tensor
    up: torch.Tensor
    scale: float
    shared: torch.Tensor
    bias: torch.Tensor | None = None


def fold_adapter_sites(sites: Sequence[LowRankSite], out: Sequence[torch.Tensor]) -> None:
    """Each site's fold, in float64, rounded once to its `out`, [hidden] of any floating dtype and strides."""
    for site, result in zip(sites, out, strict=True):
        result.copy_(rounded(exact_adapter_fold(site), result.dtype))


def exact_adapter_fold(site: LowRankSite) -> torch.Tensor:
    """The fold before rounding, shared + s·(B(A d) + β): [hidden] float64, on the device of the adapter."""
    down = exact_fold(site.columns, site.values)  # A d, [rank]
    low_rank = (site.up.detach().to(down.device).double() * down).sum(dim=1)
    if site.bias is not None:
        low_rank += site.bias.detach().to(down.device).double()
    return site.shared.to(down.device).double() + site.scale * low_rank


def adapter_error_bound(site: LowRankSite, dtype: torch.dtype) -> torch.Tensor:
    """How far a correct fold may be from the exact one, number by number: [hidden] float64.

    One unit in the last place of `dtype`, for the rounding, and n·2⁻²⁴ of all magnitudes for float32: A d is a sum of n
    products, B(A d) one of r products of such sums, and s and three more terms are rounded (Higham, Accuracy and
    Stability of Numerical Algorithms, eq. 3.5).
    """
    size = site.shared.double().abs() + abs(site.scale) * low_rank_magnitude(site)
    return bound(exact_adapter_fold(site), size, site.values.numel() + site.up.shape[1] + 4, dtype)


def low_rank_magnitude(site: LowRankSite) -> torch.Tensor:
    """|B|(|A||d|) + |β|, [hidden] float64."""
    down = magnitude(site.columns, site.values)
    low_rank = (site.up.detach().to(down.device).double().abs() * down).sum(dim=1)
    return low_rank if site.bias is None else low_rank + site.bias.detach().to(down.device).double().abs()
