"""What a lock keeps of its base beside directions and scales: the norms of the columns that its heads meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlock.basis import column_norms
from fastlock.errors import UnsupportedError
from fastlock.models.sites import Site, check_foldable


def base_norms(sites: Sequence[Site]) -> torch.Tensor | None:
    """The norm of each column of every output projection of a base: [num_layers, num_heads, head_dim] float32.

    Args:
        sites: every layer's, in order.

    Returns:
        The norms, on the CPU; None where they cannot be read (offloaded, sharded, a kind that cannot be folded) or are
        not finite: a lock without them is one all the same.
    """
    norms = []
    for site in sites:
        try:
            check_foldable(site)
        except UnsupportedError:
            return None
        norms.append(column_norms(site.head_columns(range(site.num_heads)), site.head_dim))
    stacked = torch.stack(norms)
    return stacked if stacked.isfinite().all() else None
