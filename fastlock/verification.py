"""Checking a lock: recompute every fold from the model's or checkpoint's own weights, and compare; and a band."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

import torch
from torch import nn

from fastlock.architectures.serving_stacks import named_architecture, why_lost
from fastlock.checkpoints import gguf
from fastlock.checkpoints.band_digests import StoredBand, TensorDifference, compared
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.layout import bypass
from fastlock.checkpoints.relocked import change_since, original_biases_on_disk, receipt_in
from fastlock.dtypes import BY_TORCH_NAME
from fastlock.errors import FastlockError
from fastlock.kernels.fold.reference import HeadColumns, bound, exact_fold, magnitude
from fastlock.locks.band import Band, check_band
from fastlock.locks.lock import Displacement, Lock, check_lock
from fastlock.locks.receipt import Receipt, SavedReceipt
from fastlock.models.reloaded import is_loaded, original_biases, receipt_of, unchanged
from fastlock.models.sites import Site, sites_for, unwrapped
from fastlock.storage.places import as_place, files_in
from fastlock.threads import in_threads


@dataclass(frozen=True)
class Verification:
    """What was found; true exactly when the lock is in place, whole and unaltered.

    Attributes:
        state: "locked", "not locked" or "altered".
        strength: the strength found, None where there is none.
        layers: the layers that the lock shifts.
        altered: those of them whose bias is not what their own weights give.
        reason: one sentence for people.
    """

    state: str
    strength: float | None
    layers: tuple[int, ...]
    altered: tuple[int, ...]
    reason: str

    def __bool__(self) -> bool:
        return self.state == "locked"

    def to_dict(self) -> dict[str, Any]:
        """The findings as data that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class _Evidence:
    """What one site holds, and what it would hold at strength 1: all that a judgement needs.

    Attributes:
        layer: the decoder layer.
        fold: W d at strength 1, [hidden] float64.
        magnitude: |W||d| at strength 1, [hidden] float64.
        terms: the length of the sums in it.
        dtype: of the bias.
        bias: what is there, [hidden], or None.
        rounding: how far each weight may be from the one that was folded, relative to it: more than 0 if a checkpoint
            was loaded in a narrower dtype than it was relocked in.
    """

    layer: int
    fold: torch.Tensor
    magnitude: torch.Tensor
    terms: int
    dtype: torch.dtype
    bias: torch.Tensor | None
    rounding: float = 0.0

    def is_fold(self, strength: float, original: torch.Tensor | None) -> bool:
        """Whether the bias is the fold at this strength on top of the original, within the bound of a right one."""
        if self.bias is None or self.bias.shape != self.fold.shape:
            return False
        before = torch.zeros_like(self.fold) if original is None else original.detach().to(self.fold)
        expected = strength * self.fold + before
        size = strength * self.magnitude + before.abs()
        error = (self.bias.detach().to(expected) - expected).abs()
        rounded = self.rounding * size
        return bool((error <= bound(expected, size, self.terms, self.dtype) + rounded).all())


@dataclass(frozen=True)
class BandVerification:
    """What was found of a band; true exactly when every tensor of it is the base's, byte for byte.

    Attributes:
        state: "unchanged" or "changed".
        layers: those of the band.
        tensors: how many tensors the base has there.
        digest: SHA-256 (hex) over them.
        differences: each tensor that is not the base's, and how it differs.
        reason: one sentence for people.
    """

    state: str
    layers: tuple[int, ...]
    tensors: int
    digest: str
    differences: tuple[TensorDifference, ...]
    reason: str

    def __bool__(self) -> bool:
        return self.state == "unchanged"

    def to_dict(self) -> dict[str, Any]:
        """The findings as data that JSON can hold."""
        return asdict(self)


@overload
def verify(model_or_directory: nn.Module | str | os.PathLike[str], lock: Lock) -> Verification: ...


@overload
def verify(
    model_or_directory: str | os.PathLike[str], *, base: str | os.PathLike[str], band: Band
) -> BandVerification: ...


def verify(
    model_or_directory: nn.Module | str | os.PathLike[str],
    lock: Lock | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    band: Band | None = None,
) -> Verification | BandVerification:
    """Whether this lock is in place: every fold recomputed in float64 from the weights that are there, and compared.

    A bias counts as right within one unit in the last place of its dtype, plus the rounding of a float32 sum. Of a
    directory, only configs, headers and the locked columns are read, and it must carry the biases to the stacks that
    its receipt names. A lock without a receipt is recognised too, if the layers have no biases of their own.

    Given a base and a band instead of a lock: whether the band's tensors in a directory are the base's, byte for byte,
    as they are after training with the band frozen. Headers are read and the band's bytes digested; no model is loaded.

    Args:
        model_or_directory: a model in memory, a checkpoint's directory or URL, or a GGUF file; with a band, the second.
        lock: the lock.
        base: the directory or URL of the checkpoint that the band is compared with.
        band: the layers.

    Returns:
        What was found; it is true exactly when the lock is in place, or the band unchanged.

    Raises:
        UnsupportedError: the fold is not exact in this family, or the weights are quantised or in another format.
        DamagedError: the checkpoint is damaged or hostile, or its receipt cannot be true.
        MismatchError: the lock is of another geometry, or the band of another model.
        FastlockError: the checkpoint cannot be read.
    """
    if base is not None or band is not None:
        return _verify_band(model_or_directory, lock, base, band)
    if lock is None:
        raise FastlockError("there is nothing to verify. Give the lock, or a base and a band.")
    check_lock(lock)
    if isinstance(model_or_directory, nn.Module):
        return _verify_model(unwrapped(model_or_directory), lock)
    if gguf.is_gguf(model_or_directory):
        return _verify_gguf(model_or_directory, lock)
    return _verify_checkpoint(model_or_directory, lock)


def _verify_band(
    directory: nn.Module | str | os.PathLike[str], lock: Lock | None, base: Any, band: Any
) -> BandVerification:
    if lock is not None:
        raise FastlockError("a lock and a band are verified one at a time. Give the lock alone, or a base and a band.")
    if base is None or band is None:
        raise FastlockError("a band is verified against the base that it was frozen in. Give both, base= and band=.")
    if isinstance(directory, nn.Module):
        raise FastlockError("a band is verified on disk. Save the model (save_pretrained), and give the directory.")
    checked = check_band(band)
    tuned_files = files_in(as_place(directory))
    tuned = StoredBand(tuned_files, str(directory), checked)
    found = compared(tuned, StoredBand(files_in(as_place(base)), str(base), checked))
    layers = tuple(checked.layers)
    if not found.differences:
        reason = f"all {found.tensors} tensors of layers {checked.first} to {checked.last} are the base's"
        return BandVerification("unchanged", layers, found.tensors, found.digest, (), reason)
    reason = f"{len(found.differences)} tensors of layers {checked.first} to {checked.last} are not the base's"
    if receipt_in(tuned_files, str(directory)) is not None:
        reason += "; it carries a lock, whose biases are its own: verify it without the lock (fastlock unlock)"
    return BandVerification("changed", layers, found.tensors, found.digest, found.differences, reason)


def _verify_model(model: nn.Module, lock: Lock) -> Verification:
    sites, receipt = sites_for(model, lock), receipt_of(model)
    unit = lock.displacement(1.0)
    evidence = [_evidence_in_memory(site, unit[site.layer]) for site in sites]

    if receipt is not None:
        written = dict(zip(receipt.layers, receipt.dtypes, strict=True))
        evidence = [replace(e, rounding=_rounding(written.get(e.layer), e.dtype)) for e in evidence]

    def originals(known: Receipt) -> dict[int, torch.Tensor | None]:
        by_name = original_biases(model, known)
        return {site.layer: by_name.get(site.name) for site in sites}

    def problem(known: Receipt) -> str | None:
        if is_loaded(model) and not unchanged(model, known):
            return "the locked biases are not those that fastlock wrote"
        return None

    return _judge(evidence, lock, receipt, originals, problem)


def _verify_checkpoint(directory: str | os.PathLike[str], lock: Lock) -> Verification:
    where = str(directory)
    files = files_in(as_place(directory))
    saved = receipt_in(files, where)
    checkpoint = Checkpoint(files, where)
    sites, unit = checkpoint.sites_for(lock), lock.displacement(1.0)
    evidence = in_threads(lambda site: _stored_evidence(checkpoint, site, unit[site.layer]), sites)

    def problem(_: Receipt) -> str | None:
        unlocked = bypass(checkpoint.files, checkpoint.shards.files)
        return unlocked if saved is None else _lost(checkpoint, saved) or change_since(checkpoint, saved) or unlocked

    def originals(_: Receipt) -> dict[int, torch.Tensor | None]:
        return {} if saved is None else original_biases_on_disk(checkpoint, saved)

    checkpoint.check_unchanged()
    receipt = None if saved is None else saved.receipt
    return _judge(evidence, lock, receipt, originals, problem, _why_lost(checkpoint, "transformers"))


def _verify_gguf(path: str | os.PathLike[str], lock: Lock) -> Verification:
    place = gguf.local_path(path)
    model = gguf.GgufModel(gguf.open_parts(place), str(place))
    saved = gguf.receipt_of_parts(model.parts, model.where)
    unit = lock.displacement(1.0)

    def evidence_at(site: gguf.GgufSite) -> _Evidence:
        of_layer = unit[site.layer]
        columns = model.read_columns(site, of_layer.heads).columns
        return _evidence(site.layer, columns, of_layer.values, model.read_bias(site), torch.float32)

    evidence = in_threads(evidence_at, model.sites_for(lock))

    def problem(_: Receipt) -> str | None:
        return None if saved is None else gguf.change_since(model, saved)

    def originals(_: Receipt) -> dict[int, torch.Tensor | None]:
        return {} if saved is None else gguf.original_biases(model, saved)

    model.check_unchanged()
    return _judge(evidence, lock, None if saved is None else saved.saved.receipt, originals, problem)


def _why_lost(checkpoint: Checkpoint, stack: str) -> str | None:
    return why_lost(checkpoint.model_type, stack, checkpoint.text_config, named_architecture(checkpoint.raw))


def _lost(checkpoint: Checkpoint, saved: SavedReceipt) -> str | None:
    """Why one of the stacks that the receipt names would drop the biases; None where all use them."""
    for stack in saved.carrier.stacks or ["transformers"]:
        if (reason := _why_lost(checkpoint, stack[:40])) is not None:
            return reason
    return None


def _rounding(written: str | None, loaded: torch.dtype) -> float:
    """How far weights may be, relative to themselves, from those that were folded: their dtype may be narrower now."""
    dtype = loaded if written is None else BY_TORCH_NAME.get(written, loaded)
    return 0.0 if torch.promote_types(dtype, loaded) == loaded else torch.finfo(loaded).eps


def _evidence(
    layer: int, columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> _Evidence:
    fold, size = exact_fold(columns, values).cpu(), magnitude(columns, values).cpu()
    return _Evidence(layer, fold, size, values.numel() + 1, dtype, bias)


def _evidence_in_memory(site: Site, unit: Displacement) -> _Evidence:
    columns = site.head_columns(unit.heads)
    return _evidence(site.layer, columns, unit.values, site.bias, columns.matrix.dtype)


def _stored_evidence(checkpoint: Checkpoint, site: StoredSite, unit: Displacement) -> _Evidence:
    columns = checkpoint.read_columns(site, unit.heads).columns
    bias = None if site.bias is None else checkpoint.read_vector(site.bias)
    return _evidence(site.layer, columns, unit.values, bias, site.dtype)


def _judge(
    evidence: list[_Evidence],
    lock: Lock,
    receipt: Receipt | None,
    originals: Callable[[Receipt], dict[int, torch.Tensor | None]],
    problem: Callable[[Receipt], str | None],
    lost: str | None = None,
) -> Verification:
    if receipt is None:
        return _without_receipt(evidence, lost)
    layers = tuple(e.layer for e in evidence)
    if receipt.lock_digest != lock.digest:
        other = f"it is relocked with another lock (sha256 {receipt.lock_digest[:12]}…, not {lock.digest[:12]}…)"
        return Verification("not locked", None, layers, (), other)
    if receipt.strength == 0:
        return Verification("not locked", 0.0, layers, (), "it is relocked at strength 0, which changes nothing")
    before = originals(receipt)
    altered = tuple(e.layer for e in evidence if not e.is_fold(receipt.strength, before.get(e.layer)))
    if altered:
        reason = f"{len(altered)} of {len(layers)} layers hold a bias that their own weights do not give"
        return Verification("altered", receipt.strength, layers, altered, reason)
    if (change := problem(receipt)) is not None:
        return Verification("altered", receipt.strength, layers, layers, change)
    return Verification("locked", receipt.strength, layers, (), f"all {len(layers)} layers hold their fold")


def _without_receipt(evidence: list[_Evidence], lost: str | None) -> Verification:
    """Recognise a lock by its biases alone: b = s·W d with one s for all layers, by least squares.

    Args:
        lost: why transformers would drop the biases, None where it uses them.
    """
    layers = tuple(e.layer for e in evidence)
    if all(e.bias is None or not e.bias.count_nonzero() for e in evidence):
        return Verification("not locked", None, layers, (), "there is no receipt, and no bias at the locked layers")
    folds = torch.cat([e.fold for e in evidence])
    biases = torch.cat([torch.zeros_like(e.fold) if e.bias is None else e.bias.detach().to(e.fold) for e in evidence])
    estimate = float(folds @ biases / (folds @ folds))
    # People choose round strengths: the roundest one that the biases allow.
    for strength in (*(round(estimate, digits) for digits in range(4)), estimate):
        if 0 < strength < math.inf and all(e.is_fold(strength, None) for e in evidence):
            if lost is not None:
                reason = f"there is no receipt, and every bias is the fold, but {lost}"
                return Verification("not locked", None, layers, (), reason)
            return Verification("locked", strength, layers, (), "there is no receipt, but every bias is the fold")
    reason = "there is no receipt, and the biases are not folds of this lock alone"
    return Verification("not locked", None, layers, (), reason)
