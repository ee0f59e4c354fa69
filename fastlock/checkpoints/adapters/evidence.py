"""What a relocked adapter holds at each locked layer, and what it should hold: all that a judgement of it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, open_adapter
from fastlock.checkpoints.adapters.adapter_files import SIDECAR
from fastlock.checkpoints.adapters.carriers.adapter_bias import LORA_BIAS
from fastlock.checkpoints.adapters.carriers.carrier import OpenedBase
from fastlock.checkpoints.adapters.folding import AdapterFold, AdapterFolds, fold_adapter
from fastlock.checkpoints.adapters.gate_evidence import earlier_folds, judge_gate
from fastlock.checkpoints.adapters.methods.method import SCALINGS, Scaling
from fastlock.checkpoints.adapters.relocked import adapter_receipt_in, rewritten_since
from fastlock.checkpoints.adapters.relocked_base import base_of_adapter, open_base
from fastlock.checkpoints.layout import bypass
from fastlock.checkpoints.tensor_index import read_header
from fastlock.errors import FastlockError, UnsupportedError, shown
from fastlock.judgement import SiteEvidence, Verification
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import weights_digest

_TWICE = "its base is relocked, too, and the lock acts twice"


@dataclass(frozen=True)
class AdapterEvidence:
    """What there is to judge of a relocked adapter.

    Attributes:
        receipt: the adapter's, None where it has none.
        base: the base's directory or URL, and what it is.
        sites: what is at each locked layer, in a carrier that has its biases in the adapter's own directory; in the
            base's none. A fold is f, or f / s in a LoRA.
        originals: what the biases were before, by layer, where one was.
        folds: the adapter's, at strength 1; of one with a gate, as it was before.
        problem: what else is wrong, as a clause; None where nothing is.
        note: what else there is to say, as a clause; None where there is nothing.
        of_gate: what was found of a gate in it; None where its receipt speaks of none.
    """

    receipt: AdapterReceipt | None
    base: OpenedBase
    sites: tuple[SiteEvidence, ...]
    originals: dict[int, torch.Tensor | None]
    folds: AdapterFolds
    problem: str | None
    note: str | None
    of_gate: Verification | None = None


def gather_evidence(files: Mapping[str, Any], where: str, lock: Lock, base: Any = None) -> AdapterEvidence:
    """Read an adapter's biases, and fold the lock through it at strength 1. No model is loaded.

    Args:
        files: of the adapter's directory.
        where: that directory, for messages.
        lock: the lock.
        base: the directory or URL of the base, or the base opened at strength 1; by default the one that the receipt
            or the adapter names.

    Raises:
        UnsupportedError: the adapter's method has no exact fold.
        DamagedError: adapter, base or receipt are damaged.
        MismatchError: the adapter is of another base, or the lock of another geometry.
        FastlockError: the base is not known, or cannot be read.
    """
    receipt, adapter = adapter_receipt_in(files, where), open_adapter(files, where)
    opened = base if isinstance(base, OpenedBase) else _opened(adapter, receipt, base, lock)
    if receipt is not None and receipt.rank:
        return _of_gate(files, adapter, receipt, lock, opened)
    scaling = "peft" if receipt is None or receipt.scaling is None else receipt.scaling
    folds = fold_adapter(adapter, opened.part.checkpoint, lock, 1.0, _scaling(scaling, where), part=opened.part)
    sites: tuple[SiteEvidence, ...] = ()
    originals: dict[int, torch.Tensor | None] = {}
    if receipt is None or receipt.carrier == "adapter bias":
        sites = tuple(_in_adapter(folds, fold) for fold in folds)
        originals = {} if receipt is None else {site.layer: _original(site, receipt) for site in sites}
    elif receipt.carrier == "sidecar":
        sites = _in_sidecar(files, folds, receipt, where)
    adapter.check_unchanged()
    return AdapterEvidence(
        receipt, opened, sites, originals, folds, _problem(folds, opened, receipt), _note(files, receipt, where)
    )


def _of_gate(
    files: Mapping[str, Any], adapter: Adapter, receipt: AdapterReceipt, lock: Lock, base: OpenedBase
) -> AdapterEvidence:
    """The evidence of an adapter that brings a gate."""
    folds = earlier_folds(files, adapter.where, receipt, lock, base)
    problem = bypass(adapter.files, {ADAPTER_CONFIG, ADAPTER_WEIGHTS}) or (_TWICE if base.saved is not None else None)
    found = judge_gate(adapter, receipt, folds)
    if found and problem is not None:
        found = replace(found, state="altered", altered=found.layers, reason=problem)
    adapter.check_unchanged()
    return AdapterEvidence(receipt, base, (), {}, folds, problem, _note(files, receipt, adapter.where), found)


def _opened(adapter: Adapter, receipt: AdapterReceipt | None, base: Any, lock: Lock) -> OpenedBase:
    place = base_of_adapter(adapter, receipt, base)
    if place is None:
        raise FastlockError(f"{adapter.where}: is an adapter, and is verified over its base. Give that (--base BASE).")
    return open_base(place, lock, 1.0, compared=False)


def _scaling(name: str, where: str) -> Scaling:
    for known in SCALINGS:
        if name == known:
            return known
    raise UnsupportedError(f"{where}: its receipt names the scaling {name[:40]!a}. Upgrade fastlock.")


def _size(folds: AdapterFolds, fold: AdapterFold) -> torch.Tensor:
    """The magnitudes of the products in W d and, bounded by what came of it, in what the adapter adds to that."""
    return folds.part.magnitudes[fold.layer] + (fold.bias - fold.base_part).abs()


def _in_adapter(folds: AdapterFolds, fold: AdapterFold) -> SiteEvidence:
    adapter, scale = folds.adapter, 1.0 if fold.scale is None or fold.scale == 0 else fold.scale
    stored = fold.parameters.get(LORA_BIAS)
    bias = None if stored is None or not adapter.config.get("lora_bias") else adapter.read(stored)
    dtype = torch.float32 if bias is None else bias.dtype
    terms = folds.part.displacements[fold.layer].values.numel() + 1
    size = _size(folds, fold) / abs(scale)
    return SiteEvidence(fold.layer, fold.bias / scale, size, terms, dtype, bias)


def _original(site: SiteEvidence, receipt: AdapterReceipt) -> torch.Tensor | None:
    """The bias that an adapter had at a site before; None where its receipt has none that fits."""
    data = receipt.original_biases.get(site.layer)
    if data is None or site.bias is None or len(data) != site.bias.nbytes:
        return None
    return torch.frombuffer(bytearray(data), dtype=site.dtype)


def _in_sidecar(
    files: Mapping[str, Any], folds: AdapterFolds, receipt: AdapterReceipt, where: str
) -> tuple[SiteEvidence, ...]:
    tensors = read_header(files[SIDECAR], SIDECAR, where) if SIDECAR in files else {}
    names = {site.layer: f"{site.name}.bias" for site in receipt.sites}
    sites = []
    for fold in folds:
        stored = tensors.get(names.get(fold.layer, ""))
        bias = None
        if stored is not None and stored.torch_dtype is not None and stored.shape == (fold.site.hidden_size,):
            data = bytearray(files[SIDECAR].read(stored.start, stored.length))
            bias = torch.frombuffer(data, dtype=stored.torch_dtype)
        terms = folds.part.displacements[fold.layer].values.numel() + 1
        sites.append(SiteEvidence(fold.layer, fold.bias, _size(folds, fold), terms, fold.site.dtype, bias))
    return tuple(sites)


def _problem(folds: AdapterFolds, base: OpenedBase, receipt: AdapterReceipt | None) -> str | None:
    """What is wrong beside the biases themselves."""
    return next(_problems(folds, base, receipt), None)


def _problems(folds: AdapterFolds, base: OpenedBase, receipt: AdapterReceipt | None) -> Iterator[str]:
    if any(LORA_BIAS in fold.parameters for fold in folds) and not folds.adapter.config.get("lora_bias"):
        yield "its config does not set lora_bias, without which PEFT silently drops its biases"
    if (unlocked := bypass(folds.adapter.files, {ADAPTER_CONFIG, ADAPTER_WEIGHTS})) is not None:
        yield unlocked
    if receipt is None:
        return
    if weights_digest(fold.base_digest for fold in folds) != receipt.base.weights_digest:
        yield "its base is not the one that the receipt names"
    if weights_digest(fold.digest for fold in folds) != receipt.adapter_digest:
        yield "the adapter was trained on, or is another one: its locked layers are not those that were folded"
    if receipt.carrier != "base bias" and base.saved is not None:
        yield _TWICE


def _note(files: Mapping[str, Any], receipt: AdapterReceipt | None, where: str) -> str | None:
    if receipt is None or (name := rewritten_since(files, receipt, where)) is None:
        return None
    return f"{shown(name)} was saved anew since, as PEFT does, so unlock cannot put the first one back"
