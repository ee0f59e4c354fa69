"""The forward pass with d added and nothing folded: the truth that tests compare a relocked model with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastlock.locks.lock import Lock, strength_for
from fastlock.models.sites import sites_for


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
