"""Relocking models in memory, and unlocking them: one, many at once, or for the time of a `with` block."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.fold import Fold, check_not_capturing, fold, rounded_fold
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for
from fastlock.locks.receipt import LockedSite, Receipt
from fastlock.models.base_check import check_against, check_basis
from fastlock.models.reloaded import guard_saving, mark, receipt_of, take_over
from fastlock.models.sites import BareProjections, Site, bare_sites, sites_for, text_config, unwrapped
from fastlock.models.state import ORIGINAL_BIAS, PLACED_BIAS, forget, keep, locked_sites, remove_bias, with_digests_of

_T = TypeVar("_T")

# Of each original bias that holds a lock now, the projection (a weak reference) through which it got it.
_HOLDERS: Any = WeakIdKeyDictionary()


def relock(model: nn.Module, lock: Lock, strength: float | None = None, *, base: nn.Module | None = None) -> Receipt:
    """Fold the lock through the model's own output projections and put the biases in place.

    The model then computes what it would with d = `strength * scale * direction` added to each locked head's output,
    at every position (arXiv 2410.10343): (x + d) Wᵀ + c = x Wᵀ + (c + W d). A model that is relocked already, now or
    before it was saved, gets this lock instead of the earlier one. No gradients are needed. Biases that the lock adds
    do not require any; those that were there keep their `requires_grad` and their identity.

    Args:
        model: a transformers model, on any device, in float16, bfloat16, float32 or float64; it may be
            `torch.compile`d.
        lock: the lock, extracted from this model's aligned base.
        strength: the paper's α, 0 or more; by default the one that the lock was calibrated at, or else the paper's 6.
        base: the lock's aligned base, whose locked columns are then compared with the model's, as a quantiser may have
            rotated or scaled its heads; by default their norms are, if the lock carries those of its base.

    Returns:
        What was done.

    Raises:
        MismatchError: the lock does not fit.
        UnsupportedError: the fold would not be exact in this family, its weights cannot be folded, or its heads are not
            in the basis that the lock was found in.
        DamagedError: weights hold NaN or infinities or do not belong to their config, a receipt is damaged, or a bias
            was changed since an earlier lock was put in.
        FastlockError: the strength cannot be applied, or is too large for the dtype. After any error the model is as
            it was.
    """
    if base is not None:
        check_lock(lock)
        check_against(model, lock, base)
    return _relock([model], [lock], [strength])[0]


def relock_many(
    models: Sequence[nn.Module], lock: Lock | Sequence[Lock], strength: float | Sequence[float | None] | None = None
) -> list[Receipt]:
    """Relock several models, all of them or none: one kernel launch per CUDA device, dtype, layout and head_dim.

    Models that share their output projections (the same memory) are folded once, and share the biases.

    Args:
        models: as for `relock`; their shapes and families may differ.
        lock: one lock for all, or a list with one each.
        strength: one for all, or a list with one each; None as for `relock`.

    Returns:
        A receipt per model, in order.

    Raises:
        FastlockError, and its kinds: as for `relock`. All models are as they were.
    """
    check_list(models)
    if any(isinstance(model, dict) for model in models):
        raise FastlockError("bare output projections have no place for a bias. Fold them with fastlock.Plan.")
    return _relock(models, each(lock, len(models), "lock"), each(strength, len(models), "strength"))


def _relock(models: Sequence[nn.Module], locks: Sequence[Lock], strengths: Sequence[float | None]) -> list[Receipt]:
    with changing() as undo:
        members = prepare(models, locks, strengths, undo)
        return [receipt for receipt in put_in(members, fold(folds_of(members)), undo) if receipt is not None]


def unlock(model: nn.Module) -> None:
    """Put back exactly what was there before relocking, bit for bit, and no bias where there was none.

    Raises:
        DamagedError: a bias was changed since (by training, say), and putting the original back would lose that
            change; or the receipt of a loaded model is damaged.
        FastlockError: the model is not relocked.
    """
    inner = unwrapped(model, adapters=True)
    with changing() as undo:
        take_over(inner, undo)
        if receipt_of(inner) is None:
            raise FastlockError(f"{type(inner).__name__} is not relocked; there is nothing to unlock.")
        _take_out(inner, undo)


@contextlib.contextmanager
def relocked(model: nn.Module, lock: Lock, strength: float | None = None) -> Iterator[nn.Module]:
    """The model relocked inside the `with` block; afterwards as it was before, an earlier lock included.

    Raises:
        FastlockError, and its kinds: as for `relock`; after the block as for `unlock`.
    """
    inner = unwrapped(model, adapters=True)
    with changing() as undo:
        guard_saving(model, undo)
        take_over(inner, undo)
        earlier = receipt_of(inner)
        before = _still_locked(inner, earlier) if earlier else []
        kept = [site.module.bias.detach().clone() for site in before]
        members = prepare([inner], [lock], [strength], undo)
        put_in(members, fold(folds_of(members)), undo)
    try:
        yield model
    finally:
        with changing() as undo:
            _take_out(inner, undo)
            if earlier:
                biases = [
                    bias.to(site.projection.device, site.projection.dtype)
                    for site, bias in zip(before, kept, strict=True)
                ]
                _place_all(inner, earlier, before, biases, undo)


@contextlib.contextmanager
def changing() -> Iterator[ExitStack]:
    """A stack of callbacks that undo each change: whatever error comes, all changes are undone.

    Tensors made inside are ordinary ones, in inference mode too: the model can still be trained.

    Raises:
        FastlockError: a CUDA graph is being captured.
    """
    check_not_capturing()
    with ExitStack() as undo, torch.inference_mode(False), torch.no_grad():
        yield undo
        undo.pop_all()


@dataclass(frozen=True, eq=False)
class Member:
    """One model of those that are relocked together.

    Attributes:
        model: out of its wrapper; None for bare output projections.
        lock: what it is relocked with.
        strength: the strength to apply.
        displacements: of the lock at this strength, by layer; the same object for members of the same two.
        sites: those that the lock shifts.
    """

    model: nn.Module | None
    lock: Lock
    strength: float
    displacements: Mapping[int, Displacement]
    sites: Sequence[Site]


def check_list(models: object) -> None:
    """Refuse several models that do not come as a list.

    Raises:
        FastlockError: they do not.
    """
    if not isinstance(models, Sequence) or isinstance(models, str):
        raise FastlockError(f"models is a {type(models).__name__}; give a list of models.")


def each(values: _T | Sequence[_T], count: int, name: str) -> list[_T]:
    """One value for each model, from a value for all or a list, array or tensor of them.

    Raises:
        FastlockError: there are more or fewer values than models.
    """
    if getattr(values, "ndim", 0):  # an array, or a tensor
        values = cast(Any, values).tolist()
    if isinstance(values, Sequence) and not isinstance(values, str):
        if len(values) != count:
            raise FastlockError(f"{name}: {len(values)} were given for {count} models. Give one for all, or one each.")
        return list(values)
    return [values] * count


def displacements_of(locks: Sequence[Lock], strengths: Sequence[float]) -> list[Mapping[int, Displacement]]:
    """The displacements of each lock, by layer; the same object where lock and strength are the same."""
    displacements: dict[tuple[int, float], Mapping[int, Displacement]] = {}
    for lock, strength in zip(locks, strengths, strict=True):
        if (id(lock), strength) not in displacements:
            displacements[id(lock), strength] = lock.displacement(strength)
    return [displacements[id(lock), strength] for lock, strength in zip(locks, strengths, strict=True)]


def prepare(
    models: Sequence[nn.Module | BareProjections],
    locks: Sequence[Lock],
    strengths: Sequence[float | None],
    undo: ExitStack,
) -> list[Member]:
    """Check everything about all models; take over those that came back relocked from disk.

    Raises:
        FastlockError, and its kinds: as for `relock`.
    """
    for lock in locks:
        check_lock(lock)
    applied = [strength_for(lock, strength) for lock, strength in zip(locks, strengths, strict=True)]
    inner = [model if isinstance(model, dict) else unwrapped(model, adapters=True) for model in models]
    own = [id(model) for model in inner if isinstance(model, nn.Module)]
    if len(set(own)) < len(own):
        raise FastlockError("one model is given twice; a model carries one lock. Give each model once.")
    members = []
    for model in models:
        if isinstance(model, nn.Module):
            guard_saving(model, undo)
    for i, (model, lock, displacements) in enumerate(zip(inner, locks, displacements_of(locks, applied), strict=True)):
        if isinstance(model, nn.Module):
            take_over(model, undo)
            members.append(Member(model, lock, applied[i], displacements, sites_for(model, lock)))
        else:
            members.append(Member(None, lock, applied[i], displacements, bare_sites(model, lock, f"models[{i}]")))
    _check_not_shared(members)
    for member in members:
        check_basis(member.sites, member.displacements, member.lock, _name_of(member))
    return members


def _name_of(member: Member) -> str:
    """What a member is called in messages."""
    return member.sites[0].name if member.model is None else type(member.model).__name__


def folds_of(members: Sequence[Member]) -> list[Fold]:
    """The folds of all members, member by member and site by site."""
    return [_fold_of(site, member.displacements[site.layer]) for member in members for site in member.sites]


def _fold_of(site: Site, displacement: Displacement) -> Fold:
    columns, c = site.head_columns(displacement.heads), original_bias(site)
    # The columns of a quantised or adapted projection come in float64.
    return Fold(columns, displacement.values, None if c is None else c.to(columns.matrix.dtype), site.name)


def put_in(members: Sequence[Member], biases: Sequence[torch.Tensor], undo: ExitStack) -> list[Receipt | None]:
    """Put the biases in, in the order of `folds_of`, in place of an earlier lock's.

    Returns:
        A receipt per member; None for bare projections.
    """
    receipts: list[Receipt | None] = []
    rest = iter(biases)
    for member in members:
        biases_of_member = [rounded_fold(next(rest), site.projection.dtype, site.name) for site in member.sites]
        if member.model is None:
            receipts.append(None)
            continue
        receipt = receipt_for(member)
        _take_out(member.model, undo)
        receipts.append(_place_all(member.model, receipt, member.sites, biases_of_member, undo))
    return receipts


def _check_not_shared(members: Sequence[Member]) -> None:
    """Refuse a projection, or a bias, in which the lock would act in another place too, or a second lock would."""
    modules: set[int] = set()
    biases: set[int] = set()
    for member in members:
        holding = _modules_that_hold_its_lock(member)
        uses: Counter[int] | None = None
        for site in member.sites:
            module, bias = site.module, site.bias
            if id(module) in modules or (hasattr(module, PLACED_BIAS) and id(module) not in holding):
                raise FastlockError(
                    f"{site.name} is part of another model too, which is relocked: a second lock would be added to the "
                    "first. Unlock that model first, or give the two models layers of their own."
                )
            modules.add(id(module))
            if member.model is None or bias is None:
                continue
            uses = uses or Counter(id(p) for _, p in member.model.named_parameters(remove_duplicate=False))
            holder = _HOLDERS.get(bias)
            if id(bias) in biases or uses[id(bias)] > 1 or (holder and holder() not in (None, module)):
                raise UnsupportedError(
                    f"{site.name}.bias is one parameter with that of another module: the lock would act there too, and "
                    "a parameter cannot hold two locks. Give each a parameter of its own (nn.Parameter(bias.detach()) "
                    "may share its memory)."
                )
            biases.add(id(bias))


def _modules_that_hold_its_lock(member: Member) -> set[int]:
    """The ids of a member's modules that an earlier relock of this model put a lock into."""
    receipt = None if member.model is None else receipt_of(member.model)
    if member.model is None or receipt is None:
        return set()
    return {id(site.module) for site in locked_sites(member.model, receipt)}


def original_bias(site: Site) -> torch.Tensor | None:
    """The bias without any lock, in the memory where it stays when a lock is put in."""
    bias = getattr(site.module, ORIGINAL_BIAS, None) if hasattr(site.module, PLACED_BIAS) else site.bias
    return None if bias is None else bias.detach()


def receipt_for(member: Member) -> Receipt:
    """The receipt of a member that has a model, without its digests."""
    model: Any = member.model
    earlier = receipt_of(model)
    receipt = Receipt(
        lock_digest=member.lock.digest,
        strength=member.strength,
        model_type=text_config(model).model_type,
        dtype=member.sites[0].dtype_name,
        sites=tuple(
            LockedSite(site.layer, site.name, member.displacements[site.layer].heads, original_bias(site) is not None)
            for site in member.sites
        ),
        original_config=earlier.original_config if earlier else None,
    )
    return receipt.with_dtypes([site.dtype_name for site in member.sites])


def _place_all(
    model: nn.Module, receipt: Receipt, sites: Sequence[Site], biases: Sequence[torch.Tensor], undo: ExitStack
) -> Receipt:
    for site, bias in zip(sites, biases, strict=True):
        _place(site.module, bias, undo)
    mark(model, receipt, undo)
    return with_digests_of(receipt, sites)


def _take_out(model: nn.Module, undo: ExitStack) -> None:
    """Put back every original bias, if the model is relocked."""
    receipt = receipt_of(model)
    if receipt is None:
        return
    sites = _still_locked(model, receipt)
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


def _still_locked(model: nn.Module, receipt: Receipt) -> list[Site]:
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
