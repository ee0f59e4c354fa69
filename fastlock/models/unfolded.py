"""The forward pass with d added and nothing folded: the truth that tests compare a relocked model with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastlock.locks.lock import Lock, strength_for
from fastlock.models.sites import Site, sites_for


@contextlib.contextmanager
def unfolded(model: nn.Module, lock: Lock, strength: float | None = None) -> Iterator[nn.Module]:
    """Run the model with d added to the input of each locked output projection; nothing is folded.

    This is the intervention of arXiv 2410.10343 itself, (x + d) Wᵀ + c, which a relocked model must equal at every
    position. No weight is touched.

    Args:
        model: a transformers model, on any device.
        lock: the lock, extracted from this model's aligned base.
        strength: as for `fastlock.relock`.

    Raises:
        FastlockError, and its kinds: as for `fastlock.relock`.
    """
    displacements = lock.displacement(strength_for(lock, strength))
    shifts = [
        (site, displacements[site.layer].dense(site.num_heads * site.head_dim)) for site in sites_for(model, lock)
    ]
    with displaced(shifts):
        yield model


@contextlib.contextmanager
def displaced(shifts: Iterable[tuple[Site, torch.Tensor]]) -> Iterator[None]:
    """Add to what enters some output projections.

    Args:
        shifts: sites, each with what is added to its input at every position, [num_heads · head_dim].
    """
    with contextlib.ExitStack() as hooks:
        for site, d in shifts:

            def shift(_module: nn.Module, args: tuple[torch.Tensor, ...], d: torch.Tensor = d) -> tuple[Any, ...]:
                return (args[0] + d.to(args[0]), *args[1:])

            hooks.callback(site.outer.register_forward_pre_hook(shift).remove)
        yield
