"""Putting a lock into the projections of a model, and taking it out again: each step with what undoes it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlock.errors import DamagedError
from fastlock.locks.receipt import Receipt
from fastlock.models.columns import (
    ORIGINAL_COLUMNS,
    GatedColumns,
    gated_heads,
    holds_gate,
    place_columns,
    placed_columns,
    present_columns,
    restore_columns,
)
from fastlock.models.projections import projection_of
from fastlock.models.reloaded import mark, receipt_of
from fastlock.models.sites import Site
from fastlock.models.state import (
    ORIGINAL_BIAS,
    PLACED_BIAS,
    forget,
    holds_lock,
    keep,
    locked_sites,
    remove_bias,
    with_digests_of,
)

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


@dataclass(frozen=True, eq=False)
class Placement:
    """What is put into one site.

    Attributes:
        site: where.
        heads: those that the lock shifts there, ascending.
        bias: the new bias, [hidden]; None for a lock that is a gate alone.
        columns: the new columns of these heads; None for a lock without a gate.
    """

    site: Site
    heads: tuple[int, ...]
    bias: torch.Tensor | None
    columns: GatedColumns | None

    @classmethod
    def present(cls, site: Site, heads: tuple[int, ...]) -> Placement:
        """A copy of what a lock put into a site.

        Raises:
            DamagedError: it was changed since.
        """
        _check_unchanged(site)
        module = site.module
        return cls(
            site,
            heads,
            module.bias.detach().clone() if hasattr(module, PLACED_BIAS) else None,
            GatedColumns(present_columns(site, heads)) if holds_gate(module) else None,
        )

    def converted(self) -> Placement:
        """The same on the device, and in the dtype, that the site has now."""
        device, dtype = self.site.projection.device, self.site.projection.dtype
        bias = None if self.bias is None else self.bias.to(device, dtype)
        columns = None if self.columns is None else GatedColumns(self.columns.placed.to(device, dtype))
        return replace(self, bias=bias, columns=columns)


def place_all(model: nn.Module, receipt: Receipt, placements: Sequence[Placement], undo: ExitStack) -> Receipt:
    """Put a lock into a model's sites, and note it there; what was there before is kept.

    Returns:
        The receipt, with digests of the sites.
    """
    for p in placements:
        if p.bias is not None:
            _place(p.site.module, p.bias, undo)
        if p.columns is not None:
            place_columns(p.site, p.heads, p.columns, undo)
    mark(model, receipt, undo)
    return with_digests_of(receipt, [p.site for p in placements])


def take_out(model: nn.Module, undo: ExitStack) -> None:
    """Put back every original bias, and every original column of a weight, if the model is relocked.

    Raises:
        DamagedError: a bias or a weight was changed since, or a projection was replaced.
        UnsupportedError: nobody can write to a weight any more.
    """
    receipt = receipt_of(model)
    if receipt is None:
        return
    sites = still_locked(model, receipt)
    for site in sites:
        _check_unchanged(site, or_original=True)  # of a model that was loaded over, say: there nothing is lost
    for site in sites:
        if hasattr(site.module, PLACED_BIAS):
            _restore(site.module, undo)
        if holds_gate(site.module):
            restore_columns(site, undo)
    mark(model, None, undo)


def _check_unchanged(site: Site, or_original: bool = False) -> None:
    """Refuse a site that does not hold what was put there, nor, `or_original`, what was there before that."""
    module = site.module
    if hasattr(module, PLACED_BIAS) and not _same_numbers(site.bias, getattr(module, PLACED_BIAS)):
        before = getattr(module, ORIGINAL_BIAS, None)
        if not (or_original and _same_numbers(site.bias, before)):
            raise _changed(f"{site.name}.bias", "the original")
    if holds_gate(module) and not gate_unchanged(site):
        present, before = present_columns(site, gated_heads(module)), getattr(module, ORIGINAL_COLUMNS)
        if not (or_original and _same_numbers(present, before)):
            raise _changed(f"{site.name}.weight", "the original columns")


def _changed(name: str, original: str) -> DamagedError:
    return DamagedError(
        f"{name} was changed since the model was relocked (trained, or loaded over), and putting "
        f"{original} back would lose that change. For the original, load the checkpoint again. To train, "
        "unlock first, and relock afterwards."
    )


def gate_unchanged(site: Site) -> bool:
    """Whether the locked columns of a weight are still those that a gate wrote.

    Raises:
        UnsupportedError: the weight is not there any more, or is computed before each forward pass: offloaded, pruned
            or parametrized since. Nobody could write to it.
    """
    projection_of(site.module).check(site.name)
    return _same_numbers(present_columns(site, gated_heads(site.module)), placed_columns(site))


def _same_numbers(there: torch.Tensor | None, known: torch.Tensor | None) -> bool:
    """Whether what is there is known, as far as its own dtype holds that: bitsandbytes brings it to another one."""
    if there is None or known is None:
        return False
    return there.shape == known.shape and torch.equal(there, known.to(there))


def still_locked(model: nn.Module, receipt: Receipt) -> list[Site]:
    """The sites that hold the lock; it is gone from a projection that was replaced since.

    Raises:
        DamagedError: a module that was put there since may or may not hold the lock: it has a bias, or the lock is in
            weights.
    """
    locked = []
    for site in locked_sites(model, receipt):
        if holds_lock(site.module):
            locked.append(site)
        elif receipt.rank:
            raise DamagedError(
                f"{site.name} was replaced since the model was relocked: nobody can tell whether the weight of the new "
                "module holds the lock. Put the earlier module back, or load the checkpoint again."
            )
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
