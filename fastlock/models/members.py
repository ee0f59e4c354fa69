"""The models that are relocked together: what is put into each, checked before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.fold import Fold
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for
from fastlock.models.base_check import check_basis
from fastlock.models.placing import holder_of, original_bias
from fastlock.models.reloaded import guard_saving, receipt_of, take_over
from fastlock.models.sites import BareProjections, Site, bare_sites, sites_for, unwrapped
from fastlock.models.state import PLACED_BIAS, locked_sites


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
            holder = holder_of(bias)
            if id(bias) in biases or uses[id(bias)] > 1 or (holder not in (None, module)):
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
