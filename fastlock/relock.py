"""Models in memory: relock, unlock, relocked(), many at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastlock.carrier import ORIGINAL_BIAS, PLACED_BIAS, locked_sites
from fastlock.errors import FastlockError
from fastlock.fold import fold
from fastlock.loaded import forget, keep, mark, receipt_of, take_over
from fastlock.lock import Displacement, Lock, check_lock, strength_for
from fastlock.receipt import LockedSite, Receipt
from fastlock.sites import Site, sites_for, text_config, unwrapped


def relock(model: nn.Module, lock: Lock, strength: float | None = None) -> Receipt:
    """Fold the lock through the model's own output projections and put the biases in place.

    The model then computes what it would with `strength * scale * direction` added to each locked head's output, at
    every position (arXiv 2410.10343). A model that is relocked already, now or before it was saved, gets this lock
    instead of the earlier one. No gradients are needed; biases that the lock adds do not require any, and those that
    were there keep their `requires_grad` and their identity.

    Args:
        model: a transformers model, on any device; `torch.compile`d is fine.
        lock: the lock, extracted from this model's aligned base.
        strength: the paper's α, 0 or more; by default the one that the lock was calibrated at, or else the paper's 6.

    Returns:
        What was done.

    Raises:
        FastlockError: the lock does not fit, the fold would not be exact in this family, or the weights can't be
            read. The model is as it was.
    """
    return relock_many([model], lock, strength)[0]


def relock_many(models: Sequence[nn.Module], lock: Lock, strength: float | None = None) -> list[Receipt]:
    """Relock several models with one lock, all of them, or none: one kernel launch per CUDA device and dtype.

    Args, errors: as for `relock`.

    Returns:
        A receipt per model, in order.
    """
    with _changing() as undo:
        return _relock(models, lock, strength, undo)


def unlock(model: nn.Module) -> None:
    """Put back exactly what was there before relocking, bit for bit, and no bias where there was none.

    Raises:
        FastlockError: the model is not relocked, or a bias was changed since (by training, say), so that putting
            the original back would lose that change.
    """
    inner = unwrapped(model)
    with _changing() as undo:
        take_over(inner, undo)
        if receipt_of(inner) is None:
            raise FastlockError(f"{type(inner).__name__} is not relocked; there is nothing to unlock.")
        _take_out(inner, undo)


@contextlib.contextmanager
def relocked(model: nn.Module, lock: Lock, strength: float | None = None) -> Iterator[nn.Module]:
    """The model relocked inside the `with` block; afterwards as it was before, an earlier lock included.

    Raises:
        FastlockError: as for `relock`.
    """
    inner = unwrapped(model)
    with _changing() as undo:
        take_over(inner, undo)
        earlier = receipt_of(inner)
        kept = [site.module.bias.detach().clone() for site in locked_sites(inner, earlier)] if earlier else []
        _relock([inner], lock, strength, undo)
    try:
        yield model
    finally:
        with _changing() as undo:
            _take_out(inner, undo)
            if earlier:
                sites = locked_sites(inner, earlier)
                biases = [bias.to(site.weight) for site, bias in zip(sites, kept, strict=True)]
                _put_in(inner, earlier, sites, biases, undo)


@contextlib.contextmanager
def _changing() -> Iterator[ExitStack]:
    """A stack for the undoing of each change: whatever error comes, they are all undone.

    What is made inside are ordinary tensors, in inference mode too, so that the model can still be trained.
    """
    with ExitStack() as undo, torch.inference_mode(False), torch.no_grad():
        yield undo
        undo.pop_all()


def _relock(models: Sequence[nn.Module], lock: Lock, strength: float | None, undo: ExitStack) -> list[Receipt]:
    """Loaded models are taken over, then all folds are made, then each model is changed; each change can be undone."""
    check_lock(lock)
    if not isinstance(models, Sequence):
        raise FastlockError(f"models is a {type(models).__name__}; give a list of models.")
    strength = strength_for(lock, strength)
    displacements = lock.displacement(strength)
    inner = [unwrapped(model) for model in models]
    if len({id(model) for model in inner}) < len(inner):
        raise FastlockError("one model is given twice; a model carries one lock. Remove the repetition.")
    for model in inner:
        take_over(model, undo)
    sites = [sites_for(model, lock) for model in inner]
    every = [site for of_model in sites for site in of_model]
    _check_not_shared(inner, sites)
    biases = fold(
        [site.weight for site in every],
        [displacements[site.layer] for site in every],
        [_original_bias(site) for site in every],
        [site.name for site in every],
    )
    receipts = []
    for model, of_model in zip(inner, sites, strict=True):
        receipt = _receipt(model, lock, strength, displacements, of_model)
        mine, biases = biases[: len(of_model)], biases[len(of_model) :]
        _take_out(model, undo)
        receipts.append(_put_in(model, receipt, of_model, mine, undo))
    return receipts


def _check_not_shared(models: list[nn.Module], sites: list[list[Site]]) -> None:
    seen: set[int] = set()
    for model, of_model in zip(models, sites, strict=True):
        receipt = receipt_of(model)
        mine = {locked.name for locked in receipt.sites} if receipt else set()
        for site in of_model:
            if id(site.module) in seen or (hasattr(site.module, PLACED_BIAS) and site.name not in mine):
                raise FastlockError(
                    f"{site.name} is part of another model too, which is relocked: a second lock would be added to the "
                    "first. Unlock that model first, or give the two models layers of their own."
                )
            seen.add(id(site.module))


def _original_bias(site: Site) -> torch.Tensor | None:
    """The bias without any lock."""
    return getattr(site.module, ORIGINAL_BIAS, None) if hasattr(site.module, PLACED_BIAS) else site.bias


def _receipt(
    model: nn.Module, lock: Lock, strength: float, displacements: dict[int, Displacement], sites: list[Site]
) -> Receipt:
    earlier = receipt_of(model)
    return Receipt(
        lock_digest=lock.digest,
        strength=strength,
        model_type=text_config(model).model_type,
        dtype=sites[0].dtype_name,
        sites=tuple(
            LockedSite(site.layer, site.name, displacements[site.layer].heads, _original_bias(site) is not None)
            for site in sites
        ),
        original_config=earlier.original_config if earlier else None,
    )


def _put_in(
    model: nn.Module, receipt: Receipt, sites: list[Site], biases: list[torch.Tensor], undo: ExitStack
) -> Receipt:
    for site, bias in zip(sites, biases, strict=True):
        _place(site.module, bias, undo)
    mark(model, receipt, undo)
    return receipt.of(sites)


def _take_out(model: nn.Module, undo: ExitStack) -> None:
    """Put back every original bias, if the model is relocked."""
    receipt = receipt_of(model)
    if receipt is None:
        return
    sites = locked_sites(model, receipt)
    for site in sites:
        if site.bias is None or not torch.equal(site.bias, getattr(site.module, PLACED_BIAS)):
            raise FastlockError(
                f"{site.name}.bias was changed since the model was relocked (trained, or loaded over), and putting "
                "the original back would lose that change. To get the original, load the checkpoint again; to train "
                "with a lock, unlock first and relock afterwards."
            )
    for site in sites:
        _restore(site.module, undo)
    mark(model, None, undo)


def _place(module: Any, bias: torch.Tensor, undo: ExitStack) -> None:
    """Put the bias in; an original one keeps its Parameter, so that an optimizer keeps working on it."""
    original = None if module.bias is None else module.bias.data
    keep(module, original, bias, undo)
    if original is None:
        undo.callback(setattr, module, "bias", None)
        module.bias = nn.Parameter(bias, requires_grad=False)
    else:
        undo.callback(setattr, module.bias, "data", original)
        module.bias.data = bias


def _restore(module: Any, undo: ExitStack) -> None:
    original = getattr(module, ORIGINAL_BIAS, None)
    undo.callback(keep, module, original, getattr(module, PLACED_BIAS), ExitStack())
    forget(module)
    if original is None:
        undo.callback(setattr, module, "bias", module.bias)
        module.bias = None
    else:
        undo.callback(setattr, module.bias, "data", module.bias.data)
        module.bias.data = original
