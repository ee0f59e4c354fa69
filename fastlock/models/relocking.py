"""Relocking models in memory, and unlocking them: one, many at once, or for the time of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.fold import check_not_capturing, fold, rounded_fold
from fastlock.gate_fold import GateFoldPlan
from fastlock.locks.lock import Lock, check_lock
from fastlock.locks.receipt import LockedSite, Receipt
from fastlock.models.base_check import check_against
from fastlock.models.columns import GatedColumns
from fastlock.models.members import Member, folds_of, gate_folds_of, prepare
from fastlock.models.placing import Placement, original_bias, place_all, still_locked, take_out
from fastlock.models.reloaded import guard_saving, receipt_of, take_over
from fastlock.models.sites import text_config, unwrapped

_T = TypeVar("_T")


def relock(model: nn.Module, lock: Lock, strength: float | None = None, *, base: nn.Module | None = None) -> Receipt:
    """Fold the lock through the model's own output projections and put the biases in place.

    The model then computes what it would with d = `strength * scale * direction` added to each locked head's output,
    at every position (arXiv 2410.10343): (x + d) Wᵀ + c = x Wᵀ + (c + W d). A model that is relocked already, now or
    before it was saved, gets this lock instead of the earlier one. No gradients are needed. Biases that the lock adds
    do not require any; those that were there keep their `requires_grad` and their identity.

    A lock with a gate is written into the weights, too, W + s·(W U) Vᵀ, in place and rounded once: x (W + s·(W U) Vᵀ)ᵀ
    is what W makes of x + s·U Vᵀ x. The model keeps the columns that were there before, for `unlock`. A gate alone
    adds no bias.

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
            in the basis that the lock was found in; or the lock has a gate, and the weights are quantised or adapted,
            share their memory with others, or were saved with a gate in them.
        DamagedError: weights hold NaN or infinities or do not belong to their config, a receipt is damaged, or a bias
            was changed since an earlier lock was put in, or a weight that holds its gate.
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

    Models that share their output projections (the same memory) are folded once, and share the biases. A lock with a
    gate is refused there: it would be written into the other's weights as well.

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
        return [receipt for receipt in fold_in(members, undo) if receipt is not None]


def unlock(model: nn.Module) -> None:
    """Put back exactly what was there before relocking, bit for bit, and no bias where there was none.

    Raises:
        UnsupportedError: the model was saved with the gate of a lock in its weights, and what was there before is gone;
            or a weight that holds one was offloaded, pruned or parametrized since, and cannot be written to.
        DamagedError: a bias, or a weight that holds a gate, was changed since (by training, say), and putting the
            original back would lose that change; or the receipt of a loaded model is damaged.
        FastlockError: the model is not relocked.
    """
    inner = unwrapped(model, adapters=True)
    with changing() as undo:
        take_over(inner, undo)
        if receipt_of(inner) is None:
            raise FastlockError(f"{type(inner).__name__} is not relocked; there is nothing to unlock.")
        take_out(inner, undo)


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
        before = _placements_of(inner, earlier) if earlier else []
        fold_in(prepare([inner], [lock], [strength], undo), undo)
    try:
        yield model
    finally:
        with changing() as undo:
            take_out(inner, undo)
            if earlier:
                place_all(inner, earlier, [placement.converted() for placement in before], undo)


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


def fold_in(members: Sequence[Member], undo: ExitStack) -> list[Receipt | None]:
    """Fold the locks of all members, and put them in. Takes and returns as `put_in`.

    Gates are folded into the memory in which a model keeps what was written, and one read gives that and the original
    columns. No weight is written to before all folds are known to be finite.
    """
    gates = gate_folds_of(members)
    plan = GateFoldPlan(gates)
    plan.run()
    columns = [
        GatedColumns(new.matrix, gate.columns.matrix if gate.kept is None else gate.kept)
        for gate, new in zip(gates, plan.results, strict=True)
    ]
    return put_in(members, fold(folds_of(members)), undo, columns)


def put_in(
    members: Sequence[Member], biases: Sequence[torch.Tensor], undo: ExitStack, columns: Sequence[GatedColumns] = ()
) -> list[Receipt | None]:
    """Put the locks in, in place of earlier ones.

    Args:
        members: whose they are.
        biases: of all members, in the order of `folds_of`.
        undo: what undoes it.
        columns: of all members, in the order of `gate_folds_of`.

    Returns:
        A receipt per member; None for bare projections.
    """
    receipts: list[Receipt | None] = []
    biases_left, columns_left = iter(biases), iter(columns)
    for member in members:
        placements = [
            Placement(
                site,
                member.heads(site),
                rounded_fold(next(biases_left), site.projection.dtype, site.name) if member.has_bias else None,
                next(columns_left) if member.gates else None,
            )
            for site in member.sites
        ]
        if member.model is None:
            receipts.append(None)
            continue
        receipt = receipt_for(member)
        take_out(member.model, undo)
        receipts.append(place_all(member.model, receipt, placements, undo))
    return receipts


def _placements_of(model: nn.Module, receipt: Receipt) -> list[Placement]:
    """Copies of what a lock put into a model, where it still is."""
    heads = {site.layer: site.heads for site in receipt.sites}
    return [Placement.present(site, heads[site.layer]) for site in still_locked(model, receipt)]


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
            LockedSite(site.layer, site.name, member.heads(site), original_bias(site) is not None)
            for site in member.sites
        ),
        rank=member.lock.rank,
        constant=member.has_bias,
        original_config=earlier.original_config if earlier and member.has_bias else None,
    )
    return receipt.with_dtypes([site.dtype_name for site in member.sites])
