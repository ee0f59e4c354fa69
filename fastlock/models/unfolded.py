"""The relocked forward with d added and nothing folded: the truth for every test."""

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

    This is what a relocked model must equal, at every position. It touches no weight.
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
