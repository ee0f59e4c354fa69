"""Checking a lock: recompute every fold from the model's or checkpoint's own weights, and compare; and a band."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

import torch
from torch import nn

from fastlock.architectures.serving_stacks import named_architecture, why_lost
from fastlock.checkpoints import gguf
from fastlock.checkpoints.adapters.adapter_files import holds_adapter_only
from fastlock.checkpoints.adapters.carriers.carrier import OpenedBase
from fastlock.checkpoints.adapters.evidence import AdapterEvidence, gather_evidence
from fastlock.checkpoints.band_digests import StoredBand, TensorDifference, compared
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.layout import COLUMNS_FILE, bypass
from fastlock.checkpoints.relocked import (
    change_since,
    original_biases_on_disk,
    original_files,
    receipt_in,
    was_relocked_here,
)
from fastlock.checkpoints.stored_gate import StoredGate
from fastlock.dtypes import BY_TORCH_NAME
from fastlock.errors import FastlockError
from fastlock.judgement import (
    SiteEvidence,
    Verification,
    evidence_of,
    judge,
    judge_by_digests,
    not_this_lock,
)
from fastlock.locks.band import Band, check_band
from fastlock.locks.lock import Displacement, Lock, check_lock
from fastlock.locks.receipt import Receipt, SavedReceipt
from fastlock.models.evidence import site_evidence
from fastlock.models.reloaded import can_tell, is_loaded, original_biases, receipt_of, unchanged
from fastlock.models.sites import sites_for, unwrapped
from fastlock.storage.places import as_place, files_in
from fastlock.threads import in_threads


@dataclass(frozen=True)
class BandVerification:
    """What was found of a band; true exactly when every tensor of it is the base's, byte for byte.

    In a relocked directory these are the tensors as they were before; the lock, which must be given, is verified too,
    and has to be in place.

    Attributes:
        state: "unchanged" or "changed".
        layers: those of the band.
        tensors: how many tensors the base has there.
        digest: SHA-256 (hex) over them.
        differences: each tensor that is not the base's, and how it differs.
        reason: one sentence for people.
        lock: what was found of the lock; None if none was given.
    """

    state: str
    layers: tuple[int, ...]
    tensors: int
    digest: str
    differences: tuple[TensorDifference, ...]
    reason: str
    lock: Verification | None = None

    def __bool__(self) -> bool:
        return self.state == "unchanged"

    def to_dict(self) -> dict[str, Any]:
        """The findings as data that JSON can hold."""
        return asdict(self)


@overload
def verify(
    model_or_directory: nn.Module | str | os.PathLike[str], lock: Lock, *, base: str | os.PathLike[str] | None = None
) -> Verification: ...


@overload
def verify(
    model_or_directory: str | os.PathLike[str], lock: Lock | None = None, *, base: str | os.PathLike[str], band: Band
) -> BandVerification: ...


def verify(
    model_or_directory: nn.Module | str | os.PathLike[str],
    lock: Lock | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    band: Band | None = None,
) -> Verification | BandVerification:
    """Whether this lock is in place: every fold recomputed in float64 from the weights that are there, and compared.

    A bias counts as right within one unit in the last place of its dtype, plus the rounding of a float32 sum; and so
    does a weight that a gate was written into, recomputed from what was there before. Where that is not at hand, as in
    a model that was saved with the gate and loaded again, weights are compared with the digest in the receipt. Of a
    directory, only configs, headers and the locked columns are read, and it must carry the biases to the stacks that
    its receipt names. A lock without a receipt is recognised too, if the layers have no biases of their own.

    An adapter is verified over its base: the biases that it brings, or its base's, where those hold the lock.

    Given a base and a band instead of a lock: whether the band's tensors in a directory are the base's, byte for byte,
    as they are after training with the band frozen. Headers are read and the band's bytes digested; no model is loaded.
    Of a directory that was relocked since, give the lock as well: then the band's own tensors must be the base's, and
    the biases beside them the lock's.

    Args:
        model_or_directory: a model in memory, a checkpoint's directory or URL, or a GGUF file; with a band, the second.
        lock: the lock.
        base: the directory or URL of the checkpoint that the band is compared with, or that an adapter is served over;
            by default the one that the adapter or its receipt names.
        band: the layers.

    Returns:
        What was found; it is true exactly when the lock is in place, or the band unchanged.

    Raises:
        UnsupportedError: the fold is not exact in this family, or the weights are quantised or in another format.
        DamagedError: the checkpoint is damaged or hostile, or its receipt cannot be true.
        MismatchError: the lock is of another geometry, or the band of another model.
        FastlockError: the checkpoint cannot be read.
    """
    if band is not None or (base is not None and lock is None):
        return _verify_band(model_or_directory, lock, base, band)
    if lock is None:
        raise FastlockError("there is nothing to verify. Give the lock, or a base and a band.")
    check_lock(lock)
    if not isinstance(model_or_directory, nn.Module) and not gguf.is_gguf(model_or_directory):
        return _verify_directory(model_or_directory, lock, base)
    if base is not None:
        raise FastlockError("a base is given with an adapter's directory, or with a band. Leave it out.")
    if isinstance(model_or_directory, nn.Module):
        return _verify_model(unwrapped(model_or_directory, adapters=True), lock)
    return _verify_gguf(model_or_directory, lock)


def verify_over(directory: str | os.PathLike[str], lock: Lock, base: OpenedBase) -> Verification:
    """`verify` of an adapter over its base, which is opened at strength 1, once for all of its adapters."""
    return _verify_adapter(gather_evidence(files_in(as_place(directory)), str(directory), lock, base), lock)


def _verify_directory(directory: str | os.PathLike[str], lock: Lock, base: Any) -> Verification:
    files = files_in(as_place(directory))
    if holds_adapter_only(files):
        return _verify_adapter(gather_evidence(files, str(directory), lock, base), lock)
    if base is not None:
        raise FastlockError(f"{directory}: has weights of its own, and is verified without a base. Leave the base out.")
    return _verify_checkpoint(directory, lock)


def _verify_band(
    directory: nn.Module | str | os.PathLike[str], lock: Lock | None, base: Any, band: Any
) -> BandVerification:
    if base is None or band is None:
        raise FastlockError("a band is verified against the base that it was frozen in. Give both, base= and band=.")
    if isinstance(directory, nn.Module):
        raise FastlockError("a band is verified on disk. Save the model (save_pretrained), and give the directory.")
    checked, where = check_band(band), str(directory)
    files = files_in(as_place(directory))
    of_lock = None
    if lock is not None:
        check_lock(lock)
        of_lock = _verify_checkpoint(directory, lock)
    in_place = of_lock is not None and of_lock.state == "locked"
    before = original_files(files, where) if in_place else files
    found = compared(StoredBand(before, where, checked), StoredBand(files_in(as_place(base)), str(base), checked))
    told = f"of layers {checked.first} to {checked.last}"
    if found.differences:
        reason = f"{len(found.differences)} tensors {told} are not the base's"
    else:
        reason = f"all {found.tensors} tensors {told} are the base's"
    if of_lock is not None:
        reason += f"; {_beside(of_lock, checked, lock)}"
        if found.differences and in_place and not was_relocked_here(files):
            reason += f"; transformers saved it with the lock: {_without_lock(files, where)}"
    elif found.differences and (saved := receipt_in(files, where)) is not None:
        what = "biases" if not saved.receipt.rank else "biases and weights" if saved.receipt.constant else "weights"
        reason += (
            f"; it carries a lock, whose {what} are its own: give the lock too, or verify it without (fastlock unlock)"
        )
    state = "changed" if found.differences or (of_lock is not None and not in_place) else "unchanged"
    return BandVerification(
        state, tuple(checked.layers), found.tensors, found.digest, found.differences, reason, of_lock
    )


def _without_lock(files: Any, where: str) -> str:
    """What to verify in place of a directory that transformers saved with a lock."""
    saved = receipt_in(files, where)
    if saved is not None and saved.receipt.rank:
        return "a gate is not taken out of that; verify the directory that fastlock relock wrote, or the original"
    return "verify what fastlock unlock makes of it"


def _beside(of_lock: Verification, band: Band, lock: Lock | None) -> str:
    """What is to be said of a lock in a directory whose band is verified."""
    if not of_lock:
        return f"the lock is not in place: {of_lock.reason}"
    within = [str(layer) for layer in of_lock.layers if layer in band.layers]
    which = f"those of layers {', '.join(within)} lie in the band" if within else "none lies in the band"
    what = "weights that were rewritten" if lock is not None and lock.rank else "biases that were added"
    return f"the {what} at strength {of_lock.strength:g} are the lock's ({which})"


def _verify_model(model: nn.Module, lock: Lock) -> Verification:
    sites, receipt = sites_for(model, lock), receipt_of(model)
    if receipt is not None and receipt.rank and is_loaded(model):
        problem_found = None if unchanged(model, receipt) else "the locked weights are not those that were written"
        if not can_tell(model, receipt):
            problem_found = (
                f"its weights, written in {receipt.dtype}, were loaded in a narrower dtype, in which nobody can tell "
                "whether they hold the lock"
            )
        return judge_by_digests(receipt, lock, tuple(site.layer for site in sites), problem_found)
    earlier = _dtypes_by_layer(receipt)
    unit, gates = lock.constant(1.0), {} if receipt is None else lock.gates(receipt.strength)
    evidence = [site_evidence(site, unit[site.layer], earlier[site.layer], gates.get(site.layer)) for site in sites]

    def originals(known: Receipt) -> dict[int, torch.Tensor | None]:
        by_name = original_biases(model, known)
        return {site.layer: by_name.get(site.name) for site in sites}

    def problem(known: Receipt) -> str | None:
        if is_loaded(model) and not unchanged(model, known):
            return "the locked biases are not those that fastlock wrote"
        return None

    return judge(evidence, lock, receipt, originals, problem)


def _verify_checkpoint(directory: str | os.PathLike[str], lock: Lock) -> Verification:
    where = str(directory)
    files = files_in(as_place(directory))
    saved = receipt_in(files, where)
    checkpoint = Checkpoint(files, where)
    sites, unit = checkpoint.sites_for(lock), lock.constant(1.0)
    gate = _stored_gate(checkpoint, saved, lock)

    def problem(_: Receipt) -> str | None:
        unlocked = bypass(checkpoint.files, checkpoint.shards.files)
        if saved is None:
            return unlocked
        if gate is None:
            changed = change_since(checkpoint, saved)
        else:
            changed = change_since(checkpoint, saved, gate.present_digest()) or gate.kept_others()
        return _lost(checkpoint, saved) or changed or unlocked

    if saved is not None and saved.receipt.rank and gate is None:
        return judge_by_digests(saved.receipt, lock, tuple(site.layer for site in sites), problem(saved.receipt))
    earlier = _dtypes_by_layer(None if saved is None else saved.receipt)
    evidence = in_threads(
        lambda site: _stored_evidence(checkpoint, site, unit[site.layer], earlier[site.layer], gate), sites
    )

    def originals(_: Receipt) -> dict[int, torch.Tensor | None]:
        return {} if saved is None else original_biases_on_disk(checkpoint, saved)

    checkpoint.check_unchanged()
    receipt = None if saved is None else saved.receipt
    return judge(evidence, lock, receipt, originals, problem, _why_lost(checkpoint, "transformers"))


def _stored_gate(checkpoint: Checkpoint, saved: SavedReceipt | None, lock: Lock) -> StoredGate | None:
    """The gate of this lock in a checkpoint's weights, with the columns before it; None where there is none."""
    if saved is None or not saved.receipt.rank or COLUMNS_FILE not in checkpoint.files:
        return None
    return StoredGate(checkpoint, saved.receipt, lock) if saved.receipt.lock_digest == lock.digest else None


def _verify_gguf(path: str | os.PathLike[str], lock: Lock) -> Verification:
    place = gguf.local_path(path)
    model = gguf.GgufModel(gguf.open_parts(place), str(place))
    saved = gguf.receipt_of_parts(model.parts, model.where)
    unit = lock.displacement(1.0)

    def evidence_at(site: gguf.GgufSite) -> SiteEvidence:
        of_layer = unit[site.layer]
        columns = model.read_columns(site, of_layer.heads).columns
        return evidence_of(site.layer, columns, of_layer.values, model.read_bias(site), [torch.float32])

    evidence = in_threads(evidence_at, model.sites_for(lock))

    def problem(_: Receipt) -> str | None:
        return None if saved is None else gguf.change_since(model, saved)

    def originals(_: Receipt) -> dict[int, torch.Tensor | None]:
        return {} if saved is None else gguf.original_biases(model, saved)

    model.check_unchanged()
    return judge(evidence, lock, None if saved is None else saved.saved.receipt, originals, problem)


def _verify_adapter(found: AdapterEvidence, lock: Lock) -> Verification:
    of_base = None if found.base.saved is None else found.base.saved.receipt
    in_base = of_base is not None and of_base.lock_digest == lock.digest
    if found.of_gate is not None:
        verification = found.of_gate
    elif in_base if found.receipt is None else found.receipt.carrier == "base bias":
        verification = _verify_over_base(found, lock)
    elif lock.rank and found.receipt is None:
        layers = tuple(fold.layer for fold in found.folds)
        reason = "it has no receipt, and without one no gate is recognised in an adapter"
        verification = Verification("not locked", None, layers, (), reason)
    else:
        verification = judge(list(found.sites), lock, found.receipt, lambda _: found.originals, lambda _: found.problem)
    reasons = [verification.reason]
    if found.problem is not None and verification.state != "locked" and found.problem not in reasons:
        reasons.append(found.problem)
    if found.note is not None:
        reasons.append(found.note)
    return replace(verification, reason="; ".join(reasons))


def _verify_over_base(found: AdapterEvidence, lock: Lock) -> Verification:
    """Judge an adapter whose lock is in its base's biases."""
    receipt, layers = found.receipt, tuple(fold.layer for fold in found.folds)
    if receipt is not None and (other := not_this_lock(receipt, lock, layers)) is not None:
        return other
    of_base = _verified_base(found.base, lock)
    if not of_base:
        reason = f"the lock should be in its base, {found.base.place}, and there it is not ({of_base.reason})"
        return replace(of_base, reason=reason)
    if receipt is not None and receipt.strength != of_base.strength:
        reason = f"its base is relocked at strength {of_base.strength:g}, and it was at {receipt.strength:g}"
        return Verification("altered", of_base.strength, layers, layers, reason)
    if found.problem is not None:
        return Verification("altered", of_base.strength, layers, layers, found.problem)
    return _judge_gaps(found, lock, of_base)


def _verified_base(base: OpenedBase, lock: Lock) -> Verification:
    """What is found of a relocked base: once for all adapters that it was opened for."""
    if not base.verified:
        base.verified.append(_verify_checkpoint(str(base.place), lock))
    return base.verified[0]


def _judge_gaps(found: AdapterEvidence, lock: Lock, of_base: Verification) -> Verification:
    """Judge what an adapter does to the projections whose lock is in its base."""
    receipt, layers = found.receipt, tuple(fold.layer for fold in found.folds)
    if lock.rank and (touched := tuple(fold.layer for fold in found.folds if fold.touched)):
        reason = (
            f"the adapter touches {len(touched)} of the locked projections, and the gate in its base leaves that out"
        )
        return Verification("altered", of_base.strength, layers, touched, reason)
    allowed = 0.0 if receipt is None or receipt.allowed_gap is None else receipt.allowed_gap
    gaps = {fold.layer: 0.0 if fold.shares_base else fold.gap for fold in found.folds}
    if altered := tuple(layer for layer, gap in gaps.items() if gap > allowed):
        reason = (
            f"the adapter touches the locked projections, where its base's own fold is off by {max(gaps.values()):.2%}"
        )
        return Verification("altered", of_base.strength, layers, altered, reason)
    off = f", off by at most {max(gaps.values()):.2%}, as was allowed" if max(gaps.values()) else ""
    return Verification(
        "locked", of_base.strength, layers, (), f"its base holds the fold of all {len(layers)} layers{off}"
    )


def _why_lost(checkpoint: Checkpoint, stack: str) -> str | None:
    return why_lost(checkpoint.model_type, stack, checkpoint.text_config, named_architecture(checkpoint.raw))


def _lost(checkpoint: Checkpoint, saved: SavedReceipt) -> str | None:
    """Why one of the stacks that the receipt names would drop the biases; None where none does or there are none."""
    if not saved.receipt.constant:
        return None
    for stack in saved.carrier.stacks or ["transformers"]:
        if (reason := _why_lost(checkpoint, stack[:40])) is not None:
            return reason
    return None


def _dtypes_by_layer(receipt: Receipt | None) -> defaultdict[int, list[torch.dtype]]:
    """The dtypes that each locked site has had, that of the fold first, as far as the receipt knows."""
    dtypes: defaultdict[int, list[torch.dtype]] = defaultdict(list)
    if receipt is not None:
        for site, dtype in zip(receipt.sites, receipt.dtypes, strict=True):
            dtypes[site.layer] = [BY_TORCH_NAME[name] for name in (*site.earlier_dtypes, dtype)]
    return dtypes


def _stored_evidence(
    checkpoint: Checkpoint,
    site: StoredSite,
    unit: Displacement,
    earlier: list[torch.dtype],
    gate: StoredGate | None,
) -> SiteEvidence:
    bias = None if site.bias is None else checkpoint.read_vector(site.bias)
    columns = checkpoint.read_columns(site, unit.heads).columns if gate is None else gate.before(site, unit.heads)
    evidence = evidence_of(site.layer, columns, unit.values, bias, [*earlier, site.dtype])
    return evidence if gate is None else replace(evidence, gate=gate.is_in_place(site, columns))
