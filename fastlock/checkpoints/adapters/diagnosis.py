"""What each serving stack makes of an adapter and of its lock, read off the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastlock.architectures.adapter_stacks import ADAPTER_STACKS, why_refused
from fastlock.architectures.families import head_geometry
from fastlock.checkpoints.adapters.adapter import Adapter, open_adapter
from fastlock.checkpoints.adapters.carriers.base_bias import largest_gap, listed
from fastlock.checkpoints.adapters.carriers.carrier import AdapterJob, OpenedBase
from fastlock.checkpoints.adapters.carriers.table import CARRIERS_OF_ADAPTERS, fitting_stacks
from fastlock.checkpoints.adapters.gate_lora import is_uniform
from fastlock.checkpoints.adapters.methods.lora_scales import alpha_in, peft_scale, stack_scale
from fastlock.checkpoints.adapters.methods.method import MAX_NUMBER
from fastlock.checkpoints.adapters.relocked import adapter_receipt_in
from fastlock.checkpoints.adapters.relocked_base import base_of_adapter, open_base
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.finding import Finding
from fastlock.checkpoints.relocked import receipt_in
from fastlock.errors import shown
from fastlock.locks.adapter_receipt import GATE_CARRIER, AdapterReceipt
from fastlock.locks.lock import Lock
from fastlock.storage.places import Place, files_in


@dataclass(frozen=True)
class AdapterLayer:
    """What an adapter does in one layer.

    Attributes:
        layer: the decoder layer.
        touched: whether it touches the output projection.
        peft_scale: s as PEFT has it, None where there is none.
        scale: s as the stack has it.
        gap: ‖f − W d‖ / ‖W d‖ of the lock, ‖s·B(A d)‖ / ‖W d‖ in a LoRA; None without a lock, if it has a gate, or if
            W d is zero.
    """

    layer: int
    touched: bool
    peft_scale: float | None
    scale: float | None
    gap: float | None


@dataclass(frozen=True)
class AdapterFinding(Finding):
    """What one stack makes of an adapter.

    Attributes:
        method: PEFT's name of its method.
        carriers: those that keep the lock exactly in this stack, of an adapter that is not relocked.
        layers: the locked layers; all of them without a lock; none without a base.
    """

    method: str = ""
    carriers: tuple[str, ...] = ()
    layers: tuple[AdapterLayer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The finding as data that JSON can hold."""
        return asdict(self)


def examine_adapter(
    files: Mapping[str, Any], where: str, stacks: tuple[str, ...], base: Any, lock: Lock | None
) -> list[AdapterFinding]:
    """What each stack makes of an adapter.

    Args:
        files: of the adapter's directory.
        where: that directory, for messages.
        stacks: the serving stacks to look at.
        base: the directory or URL of its base, None for the one that the receipt or the adapter names.
        lock: the lock, None where only what needs no lock is asked for.

    Raises:
        UnsupportedError: its method has no exact fold.
        DamagedError: adapter or base are damaged.
        MismatchError: the adapter is of another base, or the lock of another geometry.
        FastlockError: the base cannot be read.
    """
    adapter, receipt = open_adapter(files, where), adapter_receipt_in(files, where)
    place = base_of_adapter(adapter, receipt, base)
    if place is None:
        reason = "its base is not known: give it (--base BASE) to learn more"
        return [
            AdapterFinding(stack, False, why_refused(stack, adapter.method, adapter.config) or reason, adapter.method)
            for stack in stacks
        ]
    saved = receipt_in(files_in(place), str(place))
    strength = 1.0 if saved is None else saved.receipt.strength or 1.0
    opened = open_base(place, lock if lock is not None else _probe(place), strength, compared=False)
    job = AdapterJob(adapter, opened if lock is not None else _as_if_known(opened))
    return [_of_stack(job, opened, receipt, stack, lock is not None) for stack in stacks]


def _as_if_known(base: OpenedBase) -> OpenedBase:
    """A base, relocked or not, whose lock is taken for the probe."""
    if base.saved is None:
        return base
    receipt = replace(base.saved.receipt, lock_digest=base.part.lock.digest, strength=base.part.strength)
    return replace(base, saved=replace(base.saved, receipt=receipt))


def _probe(place: Place) -> Lock:
    """A lock of the first head in every layer of a base: it finds what an adapter touches, and means nothing."""
    checkpoint = Checkpoint(dict(files_in(place)), str(place))
    layers, (_, head_dim) = len(checkpoint.sites), head_geometry(checkpoint.text_config)
    directions = torch.zeros(layers, head_dim)
    directions[:, 0] = 1
    return Lock(
        torch.arange(layers, dtype=torch.int32), torch.zeros(layers, dtype=torch.int32), directions, torch.ones(layers)
    )


def _of_stack(
    job: AdapterJob, base: OpenedBase, receipt: AdapterReceipt | None, stack: str, with_lock: bool
) -> AdapterFinding:
    adapter = job.adapter
    of_bias = with_lock and not base.part.lock.rank
    layers = tuple(
        AdapterLayer(
            fold.layer,
            fold.touched,
            fold.peft_scale,
            fold.scale,
            fold.gap if of_bias and math.isfinite(fold.gap) else None,
        )
        for fold in job.folds(stack)
    )
    if receipt is None:
        carriers = tuple(
            name for name, carrier in CARRIERS_OF_ADAPTERS.items() if fitting_stacks(job, carrier, (stack,))
        )
        acting, reason = _of_unlocked_adapter(job, stack, carriers, with_lock)
    else:
        carriers = ()
        reason = next(_lost(job.adapter, base, receipt, stack), "")
        acting = not reason
        reason = reason or f"{stack} uses the {receipt.carrier} of all {len(receipt.layers)} locked layers"
    return AdapterFinding(
        stack, acting, "; ".join((reason, *_served_otherwise(adapter, stack))), adapter.method, carriers, layers
    )


def _of_unlocked_adapter(job: AdapterJob, stack: str, carriers: tuple[str, ...], with_lock: bool) -> tuple[bool, str]:
    """Whether a lock acts, and the reason, of an adapter without a receipt."""
    touched = [fold.layer for fold in job.folds(stack) if fold.touched]
    known = f"{job.adapter.method}, which touches {_listed(touched, 'locked ' if with_lock else '')}"
    if scales := sorted({fold.scale for fold in job.folds(stack) if fold.scale is not None}):
        known += f" with s = {scales[0]:g}" + (f" to {scales[-1]:g}" if len(scales) > 1 else "")
    if job.base.part.lock.rank:
        if job.base.saved is not None:
            return _over_gated_base(job, stack, touched, known)
    elif with_lock:
        known += f", where the base's own fold is off by at most {largest_gap(job, stack):.2%}" if touched else ""
    if job.base.saved is not None and "base bias" in carriers:
        return True, f"{known}; its base is relocked, and the lock in it acts"
    if job.base.saved is not None:
        objection = CARRIERS_OF_ADAPTERS["base bias"].objection(job, stack)
        return False, f"{known}; its base is relocked, but {objection}"
    if not carriers:
        refused = why_refused(stack, job.adapter.method, job.adapter.config)
        return False, f"{known}; not relocked, and nothing keeps a lock in {stack}{f': {refused}' if refused else ''}"
    return False, f"{known}; not relocked; for {stack} the lock would be carried by {_either(carriers)}"


def _over_gated_base(job: AdapterJob, stack: str, touched: list[int], known: str) -> tuple[bool, str]:
    """Whether the gate in a relocked base acts under an adapter, and the reason."""
    if not job.base.carries_lock:
        return False, f"{known}; its base is relocked with another lock"
    if (refused := why_refused(stack, job.adapter.method, job.adapter.config)) is not None:
        return False, f"{known}; its base is relocked, but {refused}"
    if touched:
        return False, f"{known}; its base is relocked, but the gate in it leaves out what the adapter adds there"
    return True, f"{known}; its base is relocked, and the gate in it acts"


def _lost(adapter: Adapter, base: OpenedBase, receipt: AdapterReceipt, stack: str) -> Iterator[str]:
    """Why a relocked adapter's lock does not act in a stack."""
    if receipt.carrier == "sidecar":
        yield f"the lock is in a file beside the adapter, which {stack} does not read by itself"
    if receipt.carrier == "adapter bias":
        if not ADAPTER_STACKS[stack].adapter_bias:
            yield f"{stack} refuses the adapter: it loads no biases of an adapter (lora_bias)"
        if not adapter.config.get("lora_bias"):
            yield "its config does not set lora_bias, and without it the biases are silently dropped"
        if base.saved is not None:
            yield "its base is relocked, too, and the lock acts twice"
    if receipt.carrier == GATE_CARRIER:
        if (refused := why_refused(stack, adapter.method, adapter.config)) is not None:
            yield refused
        if is_uniform((stack,)) and any(adapter.config.get(key) for key in ("rank_pattern", "alpha_pattern")):
            yield f"its modules differ in rank, and {stack} has one for all: relock the adapter for it (--for {stack})"
        if base.saved is not None:
            yield "its base is relocked, too, and the lock acts twice"
    if receipt.carrier == "base bias":
        if (refused := why_refused(stack, adapter.method, adapter.config)) is not None:
            yield refused
        yield from _lost_in_base(base, receipt, stack)


def _lost_in_base(base: OpenedBase, receipt: AdapterReceipt, stack: str) -> Iterator[str]:
    if base.saved is None or base.saved.receipt.lock_digest != receipt.lock_digest:
        yield f"the lock should be in its base, and {shown(str(base.place))} is not relocked with it"
    elif stack not in (base.saved.carrier.stacks or ()):
        yield f"its base is not relocked for {stack}"


def _served_otherwise(adapter: Adapter, stack: str) -> Iterator[str]:
    """A clause where the stack serves some module of a LoRA with another s than PEFT."""
    config, scaling = adapter.config, ADAPTER_STACKS[stack].scaling
    if adapter.method != "LORA" or scaling == "peft":
        return
    for path, parameters in adapter.modules.items():
        if (a := parameters.get("lora_A.weight")) is None or not a.shape or not a.shape[0]:
            continue
        alpha = alpha_in(config, path, adapter.where)
        said: tuple[Any, ...] = (alpha, config.get("r"), config.get("lora_alpha"))
        numbers = [float(number) for number in said if type(number) in (int, float) and 0 < abs(number) < MAX_NUMBER]
        if len(numbers) < 3:
            return
        own, whole, known = numbers
        rank = a.shape[0]
        of_peft, of_stack = peft_scale(config, own, rank), stack_scale(scaling, known, whole, rank)
        if of_peft != of_stack:
            yield (
                f"{stack} serves the adapter itself otherwise than PEFT, {shown(path)[:120]} with s = {of_stack:g} "
                f"instead of {of_peft:g}"
            )
            return


def _listed(layers: list[int], kind: str) -> str:
    if not layers:
        return f"no {kind}output projection"
    return f"the output projections of layers {listed(layers)}"


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
