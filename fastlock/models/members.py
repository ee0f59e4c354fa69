"""The models that are relocked together: what is put into each, checked before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.fold import Fold
from fastlock.gate_fold import GateFold, memory_for
from fastlock.locks.gate import Gate
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for
from fastlock.models.base_check import check_basis
from fastlock.models.columns import (
    Extent,
    check_not_around,
    check_rewritable,
    extent_of,
    gated_weights,
    holds_gate,
    original_columns,
    overlap,
    shares_memory,
)
from fastlock.models.placing import holder_of, original_bias
from fastlock.models.reloaded import guard_saving, receipt_of, take_over
from fastlock.models.sites import BareProjections, Site, bare_sites, sites_for, unwrapped
from fastlock.models.state import holds_lock, locked_sites


@dataclass(frozen=True, eq=False)
class Member:
    """One model of those that are relocked together.

    Attributes:
        model: out of its wrapper; None for bare output projections.
        lock: what it is relocked with.
        strength: the strength to apply.
        displacements: the lock's constant part at this strength, by layer; the same object for members of the same two.
        gates: the lock's gate at this strength, by layer; empty for a lock without one.
        sites: those that the lock shifts.
    """

    model: nn.Module | None
    lock: Lock
    strength: float
    displacements: Mapping[int, Displacement]
    gates: Mapping[int, Gate]
    sites: Sequence[Site]

    @property
    def has_bias(self) -> bool:
        """Whether the lock takes a bias: one that is a gate alone takes none."""
        return self.lock.has_constant or not self.lock.rank

    def heads(self, site: Site) -> tuple[int, ...]:
        """Those that the lock shifts at a site, ascending."""
        return self.displacements[site.layer].heads


def displacements_of(locks: Sequence[Lock], strengths: Sequence[float]) -> list[Mapping[int, Displacement]]:
    """The displacements of each lock, by layer; the same object where lock and strength are the same."""
    displacements: dict[tuple[int, float], Mapping[int, Displacement]] = {}
    for lock, strength in zip(locks, strengths, strict=True):
        if (id(lock), strength) not in displacements:
            displacements[id(lock), strength] = lock.constant(strength)
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
            member = Member(model, lock, applied[i], displacements, lock.gates(applied[i]), sites_for(model, lock))
            _check_gate(member)
        else:
            _check_no_gate(lock, f"models[{i}]")
            member = Member(None, lock, applied[i], displacements, {}, bare_sites(model, lock, f"models[{i}]"))
        members.append(member)
    _check_not_shared(members)
    _check_gates_apart(members)
    for member in members:
        check_basis(member.sites, member.displacements, member.lock, _name_of(member))
    return members


def _check_gate(member: Member) -> None:
    """Refuse sites into whose weights no gate can be written, and adapters around one that was."""
    for site in member.sites:
        check_not_around(site)
        if member.lock.rank:
            check_rewritable(site)


def _check_no_gate(lock: Lock, name: str) -> None:
    if lock.rank:
        raise UnsupportedError(
            f"{name}: the lock has a gate, which is written into weights, and bare output projections are only read: "
            "nobody could put the original columns back. Give the model, or use a lock without a gate."
        )


def _name_of(member: Member) -> str:
    """What a member is called in messages."""
    return member.sites[0].name if member.model is None else type(member.model).__name__


def folds_of(members: Sequence[Member]) -> list[Fold]:
    """The folds of the constant parts of all members' locks, member by member and site by site."""
    return [
        _fold_of(site, member.displacements[site.layer])
        for member in members
        if member.has_bias
        for site in member.sites
    ]


def gate_folds_of(members: Sequence[Member]) -> list[GateFold]:
    """The folds of the gates of all members' locks, member by member and site by site.

    They keep the columns that they read of the weights themselves; all others are in memory of their own anyway.
    """
    return [
        _gate_fold_of(site, member.gates[site.layer]) for member in members if member.gates for site in member.sites
    ]


def _gate_fold_of(site: Site, gate: Gate) -> GateFold:
    columns = original_columns(site, gate.heads)
    kept = None if holds_gate(site.module) else memory_for(columns, site.head_dim)
    return GateFold(columns, gate.readers, gate.writers, site.name, kept=kept)


def _fold_of(site: Site, displacement: Displacement) -> Fold:
    columns, c = original_columns(site, displacement.heads), original_bias(site)
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
            if id(module) in modules or (holds_lock(module) and id(module) not in holding):
                raise FastlockError(
                    f"{site.name} is part of another model too, which is relocked: a second lock would be added to the "
                    "first. Unlock that model first, or give the two models layers of their own."
                )
            modules.add(id(module))
            if member.model is None or bias is None or not member.has_bias:
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


def _check_gates_apart(members: Sequence[Member]) -> None:
    """Refuse weights in whose memory a gate would act in another place too, or where another model's gate is."""
    earlier: list[tuple[Member, Site, Extent | None]] = []
    others = gated_weights()
    if not others and not any(member.gates for member in members):
        return
    for member in members:
        tensors = _extents_in(member.model) if member.gates and member.model is not None else {}
        for site in member.sites:
            own = extent_of(getattr(site.module, "weight", None))
            for module, weight in others:
                if module is not site.module and overlap(own, extent_of(weight)):
                    raise shares_memory(site.name, "a projection that is relocked, whose weight holds a gate already")
            for name, extent in tensors.items():
                if name != f"{site.name}.weight" and overlap(own, extent):
                    raise shares_memory(site.name, name)
            for another, theirs, extent in earlier:
                if (member.gates or another.gates) and overlap(own, extent):
                    raise shares_memory(site.name, f"{theirs.name}.weight of another of these models")
        earlier += [(member, site, extent_of(getattr(site.module, "weight", None))) for site in member.sites]


def _extents_in(model: nn.Module) -> dict[str, Extent | None]:
    """Where a model's parameters and buffers lie, by name; a tensor that has several names has several entries."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: extent_of(tensor) for name, tensor in tensors}
