"""The forward pass with the lock acting and nothing folded: the truth that tests compare a relocked model with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastlock.locks.gate import Gate
from fastlock.locks.lock import Lock, strength_for
from fastlock.models.sites import Site, sites_for


@contextlib.contextmanager
def unfolded(model: nn.Module, lock: Lock, strength: float | None = None) -> Iterator[nn.Module]:
    """Run the model with s·(d + U Vᵀ x) added to the input x of each locked output projection; nothing is folded.

    For a lock without a gate this is the intervention of arXiv 2410.10343 itself, (x + d) Wᵀ + c, which a relocked
    model must equal at every position. No weight is touched. A gate is computed in float32, or in float64 where x is.

    Args:
        model: a transformers model, on any device.
        lock: the lock, extracted from this model's aligned base.
        strength: as for `fastlock.relock`.

    Raises:
        FastlockError, and its kinds: as for `fastlock.relock`.
    """
    strength = strength_for(lock, strength)
    constant, gates = lock.constant(strength), lock.gates(strength)
    located = [(site, site.num_heads * site.head_dim) for site in sites_for(model, lock)]
    with contextlib.ExitStack() as hooks:
        for site, width in located if gates else ():  # before d is added, which the gate does not read
            hooks.enter_context(_gated(site, gates[site.layer], width))
        hooks.enter_context(displaced((site, constant[site.layer].dense(width)) for site, width in located))
        yield model


@contextlib.contextmanager
def _gated(site: Site, gate: Gate, width: int) -> Iterator[None]:
    """Add s·U Vᵀ x to the x that enters an output projection."""
    readers, writers = gate.dense(width)

    def shift(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        shifted = x + (x @ readers.to(x)) @ writers.to(x).T
        return (shifted.to(args[0].dtype), *args[1:])

    handle = site.outer.register_forward_pre_hook(shift)
    try:
        yield
    finally:
        handle.remove()


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
