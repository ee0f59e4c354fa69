"""What a site of a model in memory holds, and what it should hold: all that a judgement of it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastlock.dtypes import coarsest
from fastlock.judgement import SiteEvidence, evidence_of, is_rewritten
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.gate import Gate
from fastlock.locks.lock import Displacement
from fastlock.models.columns import check_not_around, holds_gate, original_columns, present_columns
from fastlock.models.sites import Site


def site_evidence(site: Site, unit: Displacement, earlier: Sequence[torch.dtype], gate: Gate | None) -> SiteEvidence:
    """The evidence of one site.

    Args:
        site: of a model that may be relocked.
        unit: what the lock's constant part adds there at strength 1.
        earlier: the dtypes that the site had, that of the fold first; empty if nobody knows.
        gate: the lock's, at the strength that was applied; None for a lock without one.

    Raises:
        UnsupportedError: adapters were put around the projection after a gate was written into it.
    """
    check_not_around(site)
    columns = original_columns(site, unit.heads)
    # One of the two may be another dtype than it was: bitsandbytes rounds biases when they are first used.
    now = coarsest([columns.matrix.dtype] if site.bias is None else [columns.matrix.dtype, site.bias.dtype])
    found = evidence_of(site.layer, columns, unit.values, site.bias, [*earlier, now])
    if gate is None:
        return found
    before, present = _as_rounded(columns, found.dtype), present_columns(site, gate.heads)
    return replace(found, gate=holds_gate(site.module) and is_rewritten(before, gate, present, found.rounding))


def _as_rounded(columns: HeadColumns, dtype: torch.dtype) -> HeadColumns:
    """The same numbers in the dtype that what a gate makes of them was rounded to, if it holds them."""
    rounded = columns.matrix.to(dtype)
    return HeadColumns(rounded, columns.starts) if torch.equal(rounded.to(columns.matrix), columns.matrix) else columns
