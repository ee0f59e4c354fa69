"""The first launch of a kernel for adapters in a process, held to the reference: see `ahead_of_time.ways`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastlock.kernels.adapter_fold.reference import LowRankSite, adapter_error_bound, exact_adapter_fold
from fastlock.kernels.adapter_fold.variants import AdapterVariant
from fastlock.kernels.ahead_of_time.ways import WrongResultError
from fastlock.kernels.fold.reference import HeadColumns

HEAD_DIM = 16
# Rows beside the results that nothing may write to.
GUARD = 8


def check_adapters(
    fold: Callable[[list[LowRankSite], list[torch.Tensor]], torch.Tensor],
    variant: AdapterVariant,
    device: torch.device,
) -> bool:
    """Fold adapters that are made up by the launch to be checked, and hold all of it to the reference.

    Args:
        fold: given sites and their results, [hidden] of the variant's out_dtype: folds, and returns the flags,
            [1 + sites] int32, as in `launch.AdapterTable`.
        variant: what the sites must be made for.
        device: where.

    Returns:
        True.

    Raises:
        WrongResultError: what was written is wrong, or something was not written, or something beside it was.
    """
    sites = made_up(variant, device)
    around = [
        torch.full((len(site.up) + 2 * GUARD,), float("nan"), dtype=variant.out_dtype, device=device) for site in sites
    ]
    flags = fold(sites, [one[GUARD:-GUARD] for one in around]).cpu()  # which waits for the launch
    if flags.any():
        raise WrongResultError("its flags say that a result is not finite, and none is")
    for site, one in zip(sites, around, strict=True):
        written = one.cpu().double()
        if not (written[:GUARD].isnan().all() and written[-GUARD:].isnan().all()):
            raise WrongResultError("it wrote beside its results")
        got, exact = written[GUARD:-GUARD], exact_adapter_fold(site).cpu()
        wrong = ~((got - exact).abs() <= adapter_error_bound(site, variant.out_dtype).cpu())
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise WrongResultError(
                f"its result was wrong: row {row} of {len(got)} is {got[row]:.6g}, and should be {exact[row]:.6g}"
            )
    return True


def made_up(variant: AdapterVariant, device: torch.device) -> list[LowRankSite]:
    """Sites of one layer and of another, of ranks within and beyond one step of the loop, one with a β."""
    hidden = variant.block_rows + 8 * GUARD

    def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        # Numbers of 7 bits and a sign, which bfloat16 can hold; no two rows are alike.
        steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
        return (((steps * 37 + seed * 101) % 255 - 127) / 128).view(shape).to(device, dtype)

    sites = []
    ranks_and_starts = ((8, (0, 32)), (24, (16,))) if variant.aligned else ((3, (1, 34)), (21, (0,)))
    for seed, (rank, starts) in enumerate(ranks_and_starts):
        values = numbers(len(starts), HEAD_DIM, dtype=torch.float64, seed=seed).cpu()
        columns = HeadColumns(numbers(rank, 56, dtype=variant.dtype, seed=10 + seed), starts)
        up = numbers(hidden, rank, dtype=variant.dtype, seed=20 + seed)
        shared = numbers(hidden, dtype=torch.float32, seed=30 + seed)
        bias = numbers(hidden, dtype=variant.dtype, seed=40) if seed else None
        sites.append(LowRankSite(columns, values, up, 0.75, shared, bias))
    return sites
