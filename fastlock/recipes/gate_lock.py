"""A lock made of what a recipe found for whole layers, with what is known of the base; and which layers these are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastlock.errors import FastlockError, check_number
from fastlock.locks.lock import Lock
from fastlock.models.base_norms import base_norms
from fastlock.models.names import base_name
from fastlock.models.sites import Site, sites, text_config, unwrapped
from fastlock.version import __version__


def checked_layers(layers: Iterable[int], count: int) -> tuple[int, ...]:
    """The layers that are to have a gate, ascending.

    Args:
        layers: what was given.
        count: how many the base has.

    Raises:
        FastlockError: there are none, or one is not the base's.
    """
    chosen = tuple(layers)
    if not chosen:
        raise FastlockError("layers: there are none, and a gate is in at least one layer.")
    for layer in chosen:
        check_number("layers: one of them", layer, 0, count - 1, " of this base")
    return tuple(sorted(set(chosen)))


def gated_rows(
    site: Site,
    layers: Sequence[int],
    readers: torch.Tensor,
    writers: torch.Tensor,
    constant: torch.Tensor | None,
    kept: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a lock with a gate in some layers, by the names of its fields.

    Args:
        site: one of the base's, for its geometry.
        layers: ascending.
        readers, writers: V and U, [layers, num_heads * head_dim, rank].
        constant: d, [layers, num_heads * head_dim]; None for a gate alone.
        kept: which heads are locked, [layers, num_heads] bool; None for all of them.
    """
    count, num_heads, head_dim = len(layers), site.num_heads, site.head_dim
    v, u = (part.view(count, num_heads, head_dim, -1).flatten(0, 1).transpose(1, 2) for part in (readers, writers))
    d = torch.zeros(len(v), head_dim, device="cpu") if constant is None else constant.view(-1, head_dim)
    length = d.norm(dim=-1)
    rows = {
        "layers": torch.tensor(list(layers), device="cpu").repeat_interleave(num_heads),
        "heads": torch.arange(num_heads, device="cpu").repeat(count),
        "directions": torch.where(length[:, None] > 0, d / length[:, None], 0.0),
        "scales": length,
        "readers": v,
        "writers": u,
    }
    return rows if kept is None else {name: tensor[kept.flatten()] for name, tensor in rows.items()}


def lock_of(base: nn.Module, recipe: str, digest: str, strength: float | None, **rows: Any) -> Lock:
    """The lock of these tensors, with the base's geometry and its provenance.

    Args:
        base: the aligned base.
        recipe: how the lock was made.
        digest: of what it was made from.
        strength: that it was made for; None where it does not say.
        rows: the tensors, by the names of its fields.
    """
    model = unwrapped(base)
    base_sites, config = sites(model), text_config(model)
    norms = base_norms(base_sites)
    return Lock(
        **rows,
        num_layers=len(base_sites),
        num_heads=base_sites[0].num_heads,
        head_dim=base_sites[0].head_dim,
        hidden_size=config.hidden_size,
        base_model=base_name(model),
        recipe=recipe,
        extraction_digest=digest,
        fastlock_version=__version__,
        strength=strength,
        column_norms=None if norms is None else norms[rows["layers"], rows["heads"]],
    )
