"""Whether an adapter holds a lock's gate: A and B computed anew from base and earlier adapter, and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, open_adapter
from fastlock.checkpoints.adapters.carriers.carrier import OpenedBase
from fastlock.checkpoints.adapters.folding import AdapterFolds, fold_adapter
from fastlock.checkpoints.adapters.gate_lora import A, B, GatedModule, gate_lora, scale_of
from fastlock.checkpoints.adapters.lock_adapter import nothing_yet
from fastlock.checkpoints.adapters.relocked import check_set_aside, is_lock_alone
from fastlock.checkpoints.layout import ASIDE
from fastlock.errors import FastlockError
from fastlock.judgement import Verification, not_this_lock
from fastlock.kernels.fold.reference import bound
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import weights_digest


def earlier_folds(
    files: Mapping[str, Any], where: str, receipt: AdapterReceipt, lock: Lock, base: OpenedBase
) -> AdapterFolds:
    """The folds of an adapter as it was before it got a gate, from what was set aside.

    Args:
        files: of the adapter's directory.
        where: that directory, for messages.
        receipt: the adapter's, of a lock with a gate.
        lock: that lock.
        base: of the adapter, opened at any strength.

    Raises:
        DamagedError: what was set aside is missing, or is not of this receipt.
    """
    if is_lock_alone(receipt):
        earlier = nothing_yet(base)
    else:
        check_set_aside(files, receipt, where)
        earlier = open_adapter({name: files[ASIDE + name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}, where)
    return fold_adapter(earlier, base.part.checkpoint, lock, base.part.strength, part=base.part)


def judge_gate(adapter: Adapter, receipt: AdapterReceipt, folds: AdapterFolds) -> Verification:
    """Whether an adapter holds the gate of its receipt: A to the bit, B within the rounding of its dtype.

    Args:
        adapter: as it is now.
        receipt: its own.
        folds: of `earlier_folds`.
    """
    lock, layers = folds.part.lock, tuple(fold.layer for fold in folds)
    if (other := not_this_lock(receipt, lock, layers)) is not None:
        return other
    if (change := next(_changes(receipt, folds), None)) is not None:
        return Verification("altered", receipt.strength, layers, layers, change)
    expected = gate_lora(folds, lock.gates(receipt.strength), receipt.stacks)
    altered = tuple(module.layer for module in expected.modules if not _holds(adapter, module))
    if altered:
        reason = f"{len(altered)} of {len(layers)} layers hold an A or a B that is not the gate's, or another scale"
        return Verification("altered", receipt.strength, layers, altered, reason)
    return Verification("locked", receipt.strength, layers, (), f"all {len(layers)} layers hold their gate")


def _changes(receipt: AdapterReceipt, folds: AdapterFolds) -> Iterator[str]:
    """Why the gate would not be that of the receipt, whatever the adapter holds."""
    if weights_digest(fold.base_digest for fold in folds) != receipt.base.weights_digest:
        yield "its base is not the one that the receipt names"
    if weights_digest(fold.digest for fold in folds) != receipt.adapter_digest:
        yield "what it was before is another adapter than the one that was relocked"


def _holds(adapter: Adapter, module: GatedModule) -> bool:
    """Whether an adapter has a module as it was written."""
    parameters = adapter.modules.get(module.path, {})
    if any(name not in parameters or parameters[name].torch_dtype is None for name in (A, B)):
        return False
    try:
        a, b, scale = adapter.read(parameters[A]), adapter.read(parameters[B]), scale_of(adapter, module.path)
    except FastlockError:  # A and B do not go together, say
        return False
    expected_a, expected_b = module.a.make(), module.b.make()
    if (a.shape, b.shape, scale) != (expected_a.shape, expected_b.shape, module.scale):
        return False
    exact, gate = expected_b.double(), slice(module.own, module.own + module.rows.b.shape[1])
    allowed = torch.zeros_like(exact)
    exact[:, gate] = module.rows.b
    allowed[:, gate] = bound(module.rows.b, module.rows.b.abs().amax(dim=0), 1, module.b.dtype)
    return torch.equal(a.double(), expected_a.double()) and bool(((b.double() - exact).abs() <= allowed).all())
