"""Putting biases into the projections of a model, and taking them out again: each step with what undoes it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlock.errors import DamagedError
from fastlock.locks.receipt import Receipt
from fastlock.models.reloaded import mark, receipt_of
from fastlock.models.sites import Site
from fastlock.models.state import ORIGINAL_BIAS, PLACED_BIAS, forget, keep, locked_sites, remove_bias, with_digests_of

# Of each original bias that holds a lock now, the projection (a weak reference) through which it got it.
_HOLDERS: Any = WeakIdKeyDictionary()


def original_bias(site: Site) -> torch.Tensor | None:
    """The bias without any lock, in the memory where it stays when a lock is put in."""
    bias = getattr(site.module, ORIGINAL_BIAS, None) if hasattr(site.module, PLACED_BIAS) else site.bias
    return None if bias is None else bias.detach()


def holder_of(bias: torch.Tensor) -> Any:
    """The projection through which an original bias got the lock that it holds now; None where it holds none."""
    holder = _HOLDERS.get(bias)
    return holder and holder()


def place_all(
    model: nn.Module, receipt: Receipt, sites: Sequence[Site], biases: Sequence[torch.Tensor], undo: ExitStack
) -> Receipt:
    """Put biases into a model's sites, and note it there; what was there before is kept.

    Returns:
        The receipt, with digests of the sites.
    """
    for site, bias in zip(sites, biases, strict=True):
        _place(site.module, bias, undo)
    mark(model, receipt, undo)
    return with_digests_of(receipt, sites)


def take_out(model: nn.Module, undo: ExitStack) -> None:
    """Put back every original bias, if the model is relocked.

    Raises:
        DamagedError: a bias was changed since, or a projection was replaced.
    """
    receipt = receipt_of(model)
    if receipt is None:
        return
    sites = still_locked(model, receipt)
    for site in sites:
        if site.bias is None or not _same_numbers(site.bias, getattr(site.module, PLACED_BIAS)):
            raise DamagedError(
                f"{site.name}.bias was changed since the model was relocked (trained, or loaded over), and putting "
                "the original back would lose that change. For the original, load the checkpoint again. To train, "
                "unlock first, and relock afterwards."
            )
    for site in sites:
        _restore(site.module, undo)
    mark(model, None, undo)


def _same_numbers(bias: torch.Tensor, placed: torch.Tensor) -> bool:
    """Whether a bias is what was placed, as far as its own dtype holds that: bitsandbytes brings it to another one."""
    return bias.shape == placed.shape and torch.equal(bias, placed.to(bias))


def still_locked(model: nn.Module, receipt: Receipt) -> list[Site]:
    """The sites that hold the lock; it is gone from a projection that was replaced since.

    Raises:
        DamagedError: a module that was put there since has a bias, which may or may not hold the lock.
    """
    locked = []
    for site in locked_sites(model, receipt):
        if hasattr(site.module, PLACED_BIAS):
            locked.append(site)
        elif site.bias is not None:
            raise DamagedError(
                f"{site.name} was replaced since the model was relocked, and the new module has a bias: nobody can "
                "tell whether it holds the lock. Put the earlier module back, or load the checkpoint again."
            )
    return locked


def _place(module: Any, bias: torch.Tensor, undo: ExitStack) -> None:
    """Put the bias in; an original one keeps its Parameter, for an optimizer that holds it."""
    original = None if module.bias is None else module.bias.data
    keep(module, original, bias.detach().clone(), undo)
    if original is None:
        undo.callback(remove_bias, module)
        module.bias = nn.Parameter(bias, requires_grad=False)
    else:
        undo.callback(setattr, module.bias, "data", original)
        module.bias.data = bias
        undo.callback(_HOLDERS.pop, module.bias, None)
        _HOLDERS[module.bias] = weakref.ref(module)


def _restore(module: Any, undo: ExitStack) -> None:
    original = getattr(module, ORIGINAL_BIAS, None)
    undo.callback(keep, module, original, getattr(module, PLACED_BIAS), ExitStack())
    forget(module)
    if original is None:
        undo.callback(setattr, module, "bias", module.bias)
        remove_bias(module)
    else:
        undo.callback(setattr, module.bias, "data", module.bias.data)
        module.bias.data = original
        undo.callback(_HOLDERS.__setitem__, module.bias, weakref.ref(module))
        _HOLDERS.pop(module.bias, None)
