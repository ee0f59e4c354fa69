"""Whether an output projection's heads are still in the basis that a lock was found in, told by the columns of W.

Quantisers rotate the heads of a model (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406: R2) or scale them (AWQ,
arXiv 2306.00978), and fold the inverse into W. The model stays the same; but a head's output is another vector, and a
displacement would pull somewhere else. A fine-tune, quantised to 4 bits or not, keeps W's column norms nearly.

Against the base itself, the columns are compared one by one, or by their cosines with each other within a head (WᵀW,
normed). Those are the same after a rotation of the residual stream (R1), which does a lock no harm, and others after
one of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastlock.errors import UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns

# So many rows tell about as much as all: a column's norm within 3 %, in a twentieth of the time of the fold.
SAMPLED_ROWS = 512
# Beyond it a sample is not enough, and all rows count.
_DOUBT = 0.045
# How far logarithms of norm ratios may be spread within a head, in the median of the locked heads. Of all heads of
# SmolLM2-135M it is 0.001 after full training at 20 times the usual rate, 0.003 in 4 bits and 0.009 in 3, 0.04 where a
# LoRA's training diverged; 0.08 smoothed by a tenth of what AWQ may, 0.1 rotated.
MAX_SPREAD = 0.06
# By how much a whole head may be larger or smaller, in the median of the locked heads and in any: as a logarithm. Of
# the same models it is 0.04 and 0.07; 0.04 and 0.65 where training diverged.
MAX_LEVEL, MAX_LEVEL_OF_ONE = math.log(1.25), math.log(2)
# How alike the columns must be to the base's: 1 is the same. Rotated heads are below 0.15, fine-tunes at 3 bits above
# 0.9.
MIN_ALIKE = 0.5

_WHAT_TO_DO = (
    "Quantise the checkpoint that it was made from without rotating or scaling its heads, and relock that. If this is "
    "not a fine-tune of the lock's base, use the lock of its own base. Nothing was changed."
)


class Columns(Protocol):
    """The columns of some heads, in the rows that are asked for: `HeadColumns`, or such as are dequantised then."""

    @property
    def hidden(self) -> int:
        """How many rows there are."""

    def in_rows(self, rows: slice) -> HeadColumns:
        """Those in some rows."""


@dataclass(frozen=True, eq=False)
class Likeness:
    """How alike the columns of one site's locked heads and those of the lock's base are.

    Attributes:
        levels: the median of log(norm / norm in the base) over the columns of a head, [heads] float64.
        spreads: the root mean square of the rest of it, [heads] float64.
        alike: how alike a head's columns are, one by one or by the cosines between them, whichever is more, [heads]
            float64; None where only norms are known.
    """

    levels: torch.Tensor
    spreads: torch.Tensor
    alike: torch.Tensor | None = None


def column_norms(columns: Columns, head_dim: int, every: int = 1) -> torch.Tensor:
    """The Euclidean norm of each column, over the hidden dimension: [heads, head_dim] float32, on the CPU.

    Args:
        columns: those of some heads.
        head_dim: how many a head has.
        every: take one row of so many, and estimate.
    """
    taken = columns.in_rows(slice(None, None, every))
    matrix = taken.matrix
    sums = torch.zeros(len(taken.starts), head_dim, dtype=torch.float64, device=matrix.device)
    for i, start in enumerate(taken.starts):
        for rows in matrix[:, start : start + head_dim].split(SAMPLED_ROWS):
            # In float32 alone, where a float64 would overflow: a fold of such weights is refused for that.
            narrow = rows.float()
            sums[i] += narrow.mul_(narrow).sum(dim=0) if narrow is not rows else narrow.square().sum(dim=0)
    return (sums * (columns.hidden / max(1, len(matrix)))).sqrt().float().cpu()


def likeness(columns: Columns, norms: torch.Tensor, base: HeadColumns | None = None) -> Likeness | None:
    """How alike the locked heads of one site and those of the base are; None where norms are not finite.

    Args:
        columns: those of the site.
        norms: of the base's columns, [heads, head_dim].
        base: the base's columns, if they are at hand.
    """
    head_dim = norms.shape[1]
    every = max(1, columns.hidden // SAMPLED_ROWS)
    found = _likeness_of_norms(column_norms(columns, head_dim, every), norms)
    if found is not None and every > 1 and float(found.spreads.max()) > _DOUBT:
        found = _likeness_of_norms(column_norms(columns, head_dim), norms)
    if found is None or base is None:
        return found
    return Likeness(found.levels, found.spreads, _alike(columns.in_rows(slice(None)), base, head_dim))


def _likeness_of_norms(found: torch.Tensor, norms: torch.Tensor) -> Likeness | None:
    ratios = found.double().log() - norms.double().log()
    if not found.isfinite().all():
        return None
    ratios = torch.where(ratios.isfinite(), ratios, torch.nan)  # columns of zeros, as pruning leaves them, say nothing
    levels = ratios.nanmedian(dim=1).values
    spreads = (ratios - levels[:, None]).square().nanmean(dim=1).sqrt()
    return Likeness(levels.nan_to_num(), spreads.nan_to_num())


def _alike(columns: HeadColumns, base: HeadColumns, head_dim: int) -> torch.Tensor:
    between = ~torch.eye(head_dim, dtype=torch.bool, device="cpu")
    alike = []
    for start, of_base in zip(columns.starts, base.starts, strict=True):
        own, theirs = (
            torch.nn.functional.normalize(part.matrix[:, first : first + head_dim].cpu().double(), dim=0)
            for part, first in ((columns, start), (base, of_base))
        )
        own_cosines, their_cosines = ((matrix.t() @ matrix)[between] for matrix in (own, theirs))
        one_by_one = (own * theirs).sum(dim=0).median()
        between_columns = torch.nn.functional.cosine_similarity(own_cosines, their_cosines, dim=0)
        alike.append(one_by_one.maximum(between_columns))
    return torch.stack(alike)


def check_likeness(sites: Sequence[Likeness | None], where: str) -> None:
    """Refuse a model, or a checkpoint, whose heads are not in the basis that the lock was found in.

    Args:
        sites: of all locked sites.
        where: the model, for messages.

    Raises:
        UnsupportedError: its heads look rotated, smoothed, or scaled.
    """
    known = [site for site in sites if site is not None]
    if not known:
        return
    levels, spreads = (torch.cat([getattr(site, name) for site in known]) for name in ("levels", "spreads"))
    compared = [site.alike for site in known if site.alike is not None]
    spread, level = float(spreads.median()), float(levels.abs().median())
    farthest = float(levels.abs().max())
    if compared and (alike := float(torch.cat(compared).median())) < MIN_ALIKE:
        raise UnsupportedError(
            f"{where}: the columns of its locked heads are not the base's: their cosine is {alike:.2f}, where a "
            f"fine-tune's is above 0.9. It looks like rotated heads (R2 of "
            "QuaRot or SpinQuant), or like a model of another base, and a lock would pull somewhere else. "
            f"{_WHAT_TO_DO}"
        )
    if spread > MAX_SPREAD:
        raise UnsupportedError(
            f"{where}: the columns of its locked heads have other norms than in the lock's base: within a head, by "
            f"{100 * math.expm1(spread):.0f} % and more, where a fine-tune's differ by less than 2 %. It looks like "
            "AWQ's smoothing of v_proj into o_proj, or like rotated heads (R2 of QuaRot or SpinQuant), and a lock "
            f"would pull somewhere else. {_WHAT_TO_DO}"
        )
    if level > MAX_LEVEL or farthest > MAX_LEVEL_OF_ONE:
        raise UnsupportedError(
            f"{where}: its locked heads are not of the size that they have in the lock's base, one by a factor of "
            f"{math.exp(farthest):.2f}. It looks like heads rescaled one by one, and a lock would pull by another "
            f"strength in each. {_WHAT_TO_DO}"
        )
