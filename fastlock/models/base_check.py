"""Whether a model in memory has its heads in the basis that a lock was found in: asked of every relock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from fastlock.basis import check_likeness, column_norms, likeness
from fastlock.errors import MismatchError
from fastlock.locks.lock import Displacement, Lock
from fastlock.models.columns import original_columns
from fastlock.models.sites import Site, check_foldable, sites_for, unwrapped
from fastlock.models.sites import sites as every_site


def check_basis(sites: Sequence[Site], displacements: Mapping[int, Displacement], lock: Lock, where: str) -> None:
    """Compare the norms of a model's locked columns with those that the lock carries; without those, nothing is done.

    Raises:
        UnsupportedError: its heads look rotated, smoothed or scaled.
    """
    norms = lock.norms_by_layer()
    if norms:
        columns = ((site, original_columns(_without_adapters(site), displacements[site.layer].heads)) for site in sites)
        check_likeness([likeness(found, norms[site.layer]) for site, found in columns], where)


def check_against(model: nn.Module, lock: Lock, base: nn.Module) -> None:
    """Compare a model's locked columns with those of the lock's base.

    Raises:
        MismatchError: the base has another shape, or the lock does not fit.
        UnsupportedError: the model's heads look rotated, smoothed or scaled; or it, or the base, cannot be folded.
    """
    own, of_base = sites_for(model, lock), {site.layer: site for site in every_site(unwrapped(base))}
    name, found = type(unwrapped(model, adapters=True)).__name__, []
    for site in own:
        heads = lock.heads[lock.layers == site.layer].sort().values.tolist()
        theirs = of_base.get(site.layer)
        if theirs is None or (theirs.num_heads, theirs.head_dim) != (site.num_heads, site.head_dim):
            raise MismatchError(f"{name}: the given base has another shape. Give the base that the lock was found in.")
        check_foldable(theirs)
        columns = original_columns(theirs, heads)
        own_columns = original_columns(_without_adapters(site), heads)
        found.append(likeness(own_columns, column_norms(columns, site.head_dim), columns))
    check_likeness(found, name)


def _without_adapters(site: Site) -> Site:
    """The projection that adapters stand around: they change its columns, and not the basis of the heads before it."""
    return replace(site, adapter=None)
