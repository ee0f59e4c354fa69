"""The first launch of a kernel for gates in a process, held to the reference: see `ahead_of_time.ways`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastlock.kernels.ahead_of_time.ways import WrongResultError
from fastlock.kernels.fold.reference import HeadColumns, error_bound, exact_fold
from fastlock.kernels.gate_fold.reference import GateSite, exact_rewritten, gate_error_bound, locked_columns
from fastlock.kernels.gate_fold.variants import GateVariant

# Rows and columns beside the results that nothing may write to.
GUARD = 8


@dataclass(frozen=True, eq=False)
class MadeUp:
    """A site whose results lie in memory that holds NaN; W as it is before; and that memory, with a guard around it."""

    site: GateSite
    before: HeadColumns
    around: tuple[torch.Tensor, ...]


def check_gates(rewrite: Callable[[list[GateSite]], torch.Tensor], variant: GateVariant, device: torch.device) -> bool:
    """Rewrite weights that are made up by the launch to be checked, and hold all of them to the reference.

    Args:
        rewrite: given sites: rewrites them, and returns the flags, [1 + sites] int32, as in `launch.GateTable`.
        variant: what the sites must be made for.
        device: where.

    Returns:
        True.

    Raises:
        WrongResultError: what was written is wrong, or something was not written, or something beside it was.
    """
    made = made_up(variant, device)
    flags = rewrite([one.site for one in made]).cpu()  # which waits for the launch
    if flags.any():
        raise WrongResultError("its flags say that a result is not finite, and none is")
    for one in made:
        _check_one(one)
    return True


def made_up(variant: GateVariant, device: torch.device) -> list[MadeUp]:
    """A site that is rewritten where it is and keeps what was there, and one that is read from elsewhere.

    The first has heads side by side, in more than one chunk, and a constant part if the variant has a lane for it.
    """
    in_place = [1, 2, 3, 4, 5, 7]  # of a quarter of a chunk each
    constant = variant.lanes > 1
    return [
        _made_up(variant, device, (in_place, in_place), variant.lanes - constant, constant=constant),
        _made_up(variant, device, ([0, 1], [2, 0]), 1, constant=False),
    ]


def _made_up(
    variant: GateVariant, device: torch.device, heads: tuple[list[int], list[int]], rank: int, constant: bool
) -> MadeUp:
    head_dim = variant.block_columns // 4
    hidden, numbers = variant.block_rows + GUARD, len(heads[0]) * head_dim
    sources, targets = (tuple(head * head_dim for head in of) for of in heads)
    source = _matrix(hidden, max(sources) + 2 * head_dim, variant, device)
    for number, start in enumerate(sources):
        source[1][:, start : start + head_dim] = _numbers(hidden, head_dim, seed=number).to(device, variant.dtype)
    before = HeadColumns(source[1].clone(), sources)
    target = source if sources == targets else _matrix(hidden, max(targets) + 2 * head_dim, variant, device)
    kept = _matrix(hidden, numbers, variant, device)
    readers, writers = (_numbers(rank, numbers, seed=seed).view(rank, -1, head_dim) for seed in (101, 202))
    site = GateSite(HeadColumns(source[1], sources), readers, writers / 16, HeadColumns(target[1], targets), kept[1])
    around = [target[0], kept[0]]
    if constant:
        out = torch.full((hidden + 2 * GUARD,), float("nan"), dtype=variant.dtype, device=device)
        bias, values = _numbers(hidden, 1, seed=303).flatten(), _numbers(len(sources), head_dim, seed=404)
        more = {"values": values, "bias": bias.to(device, variant.dtype), "out": out[GUARD:-GUARD]}
        site = GateSite(**vars(site) | more)
        around.append(out)
    return MadeUp(site, before, tuple(around))


def _matrix(hidden: int, width: int, variant: GateVariant, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN, in the variant's layout: all of it, and what is inside its guard, [hidden, width]."""
    lines, length = (width, hidden) if variant.transposed else (hidden, width)
    whole = torch.full((lines + 2, length + 2 * GUARD), float("nan"), dtype=variant.dtype, device=device)
    whole = whole if variant.aligned else whole[:, :-1].contiguous()  # rows that begin between 16 bytes
    inside = whole[1:-1, GUARD : GUARD + length]
    return (whole.t(), inside.t()) if variant.transposed else (whole, inside)


def _numbers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """[rows, columns] float64 of 7 bits and a sign, which bfloat16 can hold; no two rows are alike."""
    steps = torch.arange(rows * columns, dtype=torch.float64, device="cpu").view(rows, columns)
    return ((steps * 37 + seed * 101) % 255 - 127) / 128


def _check_one(one: MadeUp) -> None:
    site, head_dim = one.site, one.site.head_dim
    exact = exact_rewritten(one.before, site.readers, site.writers).cpu()
    bound = gate_error_bound(one.before, site.readers, site.writers).cpu()
    _compare(locked_columns(site.target, head_dim), exact, bound, "its new weights were wrong")
    if site.kept is not None:
        kept = locked_columns(one.before, head_dim).double().cpu()
        _compare(site.kept, kept, torch.zeros_like(kept), "what it was to keep is wrong")
    if site.values is not None and site.out is not None:
        folded = exact_fold(one.before, site.values, site.bias).cpu()
        _compare(site.out, folded, error_bound(one.before, site.values, site.bias).cpu(), "its bias was wrong")
    written = site.target.matrix.shape[0] * head_dim * len(site.target.starts)
    written += 0 if site.kept is None else site.kept.numel()
    written += 0 if site.out is None else site.out.numel()
    if sum(int((~of.isnan()).sum()) for of in one.around) != written:
        raise WrongResultError("it wrote beside its results")


def _compare(result: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    got = result.double().cpu()
    wrong = (~((got - exact).abs() <= bound)).nonzero()
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        raise WrongResultError(f"{what}: at {list(place)} is {got[place]:.6g}, and should be {exact[place]:.6g}")
