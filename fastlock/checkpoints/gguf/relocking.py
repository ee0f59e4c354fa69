"""A GGUF model, relocked into new files: the biases of the locked layers are added, all else is as it was."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlock.basis import Likeness, check_likeness
from fastlock.checkpoints.base import Base, base_of
from fastlock.checkpoints.gguf.header import (
    PREAMBLE_LENGTH,
    GgufHeader,
    aligned,
    encoded_counts,
    encoded_tensor,
    encoded_text,
)
from fastlock.checkpoints.gguf.model import GgufModel, GgufSite
from fastlock.checkpoints.gguf.new_files import BLOCK_BYTES, FileRange, NewFile, created
from fastlock.checkpoints.gguf.originals import original_parts, with_split_tensors
from fastlock.checkpoints.gguf.parts import SUFFIX, GgufPart, local_path, open_parts, part_paths
from fastlock.checkpoints.gguf.saved import RECEIPT_KEY, GgufReceipt, OriginalFile, receipt_of_parts
from fastlock.checkpoints.gguf.tensor_types import F32
from fastlock.errors import FastlockError, UnsupportedError, shown
from fastlock.fold import Fold, fold, rounded_fold
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for
from fastlock.locks.receipt import (
    CarrierNote,
    KnownDigests,
    LockedSite,
    Receipt,
    SavedReceipt,
    biases_digest,
    raw_bytes,
    weights_digest,
)
from fastlock.storage.new_directory import check_absent
from fastlock.threads import in_threads

STACKS = ("llama.cpp",)


@dataclass(frozen=True)
class _FoldedSite:
    """One site's new bias, what was there before, and the SHA-256 of what was read. Both are [hidden] float32.

    And how alike its columns and those of the lock's base are, None where nothing can be compared.
    """

    site: GgufSite
    heads: tuple[int, ...]
    bias: torch.Tensor
    original: torch.Tensor | None
    digest: bytes
    likeness: Likeness | None


def relock_gguf(
    source: str | os.PathLike[str],
    lock: Lock,
    out: str | os.PathLike[str],
    strength: float | None = None,
    *,
    copy: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Receipt:
    """Relock a GGUF model for llama.cpp into a new file, reading its header and its locked columns only.

    The new file has one tensor more for each locked layer, `blk.N.attn_output.bias` in F32 (where there is one already,
    it is changed), and the receipt in its metadata, as `fastlock.receipt`. All other tensors and metadata are the same
    bytes in the same order. Where the file system can, both files share the blocks of the weights. A file that is
    relocked already gets this lock instead of the earlier one.

    Args:
        source: the file, which is only read; the first part of a split model.
        lock: the lock of its aligned base.
        out: the file to make; it must not exist yet. Of a split model, the first part, named as the source's is.
        strength: the paper's α, 0 or more; by default as for `fastlock.relock`.
        copy: share no blocks.
        base: the directory or URL of the lock's aligned base, a checkpoint, whose locked columns are then compared with
            the model's; by default their norms are compared with those that the lock carries, if it carries any.

    Returns:
        What was done.

    Raises:
        UnsupportedError: llama.cpp would not use the bias in this architecture, the weights are of a type that cannot
            be read, the file is no model, or its heads are not in the basis that the lock was found in; or the lock has
            a gate.
        DamagedError: the file is damaged, hostile, or was changed (since it was relocked, or meanwhile).
        MismatchError: the lock or the base is of another geometry.
        FastlockError: an argument is wrong, the base cannot be read, the package gguf is missing, or the file system
            refuses.

    After an error nothing is at `out`.
    """
    check_lock(lock)
    check_no_gate(lock, str(source))
    strength = strength_for(lock, strength)
    path = local_path(source)
    model = original_model(path)
    places = places_for(local_path(out), len(model.parts))
    sites, displacements = model.sites_for(lock), lock.displacement(strength)
    of_base = base_of(lock, base, model.geometry.shape, model.where)
    folded = in_threads(lambda site: _folded(model, site, displacements[site.layer], of_base), sites)
    check_likeness([f.likeness for f in folded], model.where)
    receipt = _receipt(model, lock, strength, folded)
    with created(_new_files(model, folded, receipt, places), share=not copy):
        model.check_unchanged()
    return receipt


def original_model(path: Path) -> GgufModel:
    """A model as it was before it was relocked; one that is not relocked as it is.

    Raises:
        FastlockError: as of `relock_gguf`.
    """
    model = GgufModel(open_parts(path), str(path))
    receipt = receipt_of_parts(model.parts, model.where)
    return model if receipt is None else GgufModel(original_parts(model, receipt), model.where)


def check_gguf_stacks(stacks: Collection[str], where: str) -> None:
    """Refuse stacks in which a lock in a GGUF would not act.

    Raises:
        UnsupportedError: there are others than llama.cpp.
    """
    if set(stacks) != set(STACKS):
        raise UnsupportedError(
            f"{where}: is a GGUF, in which a lock acts in llama.cpp alone. Leave --for out, or relock the checkpoint "
            "that it was converted from."
        )


def check_no_gate(lock: Lock, where: str) -> None:
    """Refuse a lock with a gate.

    Raises:
        UnsupportedError: it has one.
    """
    if lock.rank:
        raise UnsupportedError(
            f"{where}: is a GGUF, and the lock has a gate, which is written into weights; those of a GGUF are not "
            "rewritten. Relock the checkpoint that it was made from, and convert that. For weights that are quantised, "
            "have the gate as an adapter: fastlock.relock_as_adapter, or `fastlock relock --as adapter`."
        )


def places_for(out: Path, count: int) -> list[Path]:
    """Where the files of a model go.

    Raises:
        FastlockError: the name is not one by which a GGUF, or the parts of a split one, would be found; or there is
            something already.
    """
    if out.suffix.lower() != SUFFIX:
        raise FastlockError(f"{out}: a GGUF is a file whose name ends in {SUFFIX}. Name it {out.name}{SUFFIX}.")
    places = [out] if count == 1 else part_paths(out, count)
    for place in places:
        check_absent(place)
    return places


def _folded(model: GgufModel, site: GgufSite, displacement: Displacement, base: Base) -> _FoldedSite:
    read, original = model.read_columns(site, displacement.heads), model.read_bias(site)
    dtype, name = read.columns.matrix.dtype, f"{model.where}: {shown(site.name)}"
    c = None if original is None else original.to(dtype)
    (bias,) = fold([Fold(read.columns, displacement.values, c, name)])
    bias = rounded_fold(bias, torch.float32, name)
    alike = base.likeness(site.layer, displacement.heads, read.columns)
    return _FoldedSite(site, displacement.heads, bias, original, read.digest, alike)


def _receipt(model: GgufModel, lock: Lock, strength: float, folded: Sequence[_FoldedSite]) -> Receipt:
    return Receipt(
        lock_digest=lock.digest,
        strength=strength,
        model_type=model.architecture,
        dtype="float32",
        sites=tuple(LockedSite(f.site.layer, f.site.name, f.heads, f.original is not None) for f in folded),
        digests=KnownDigests(weights_digest(f.digest for f in folded), biases_digest(f.bias for f in folded)),
    )


def _new_files(
    model: GgufModel, folded: Sequence[_FoldedSite], receipt: Receipt, places: Sequence[Path]
) -> list[NewFile]:
    """What the relocked files hold: the biases that are added are in the first of them."""
    originals = {f.site.layer: raw_bytes(f.original) for f in folded if f.original is not None}
    note = CarrierNote(form="native", flag="", was=True, original_biases=originals, stacks=STACKS)
    saved = GgufReceipt(SavedReceipt(receipt, note), tuple(OriginalFile.of(part) for part in model.parts))
    added = [f for f in folded if f.site.bias is None]
    files = []
    for i, (part, place) in enumerate(zip(model.parts, places, strict=True)):
        raw = part.header.raw
        if len(model.parts) > 1:
            raw = with_split_tensors(raw, part.header, len(added))
        pieces: list[bytes | FileRange]
        if i == 0:
            pieces = _with_additions(part, raw, added, saved.to_json())
        else:
            pieces = [raw + part.head[len(raw) :], data_of(part)]
        start = len(pieces[0]) if isinstance(pieces[0], bytes) else 0
        changed = [(f.site.bias.offset, raw_bytes(f.bias)) for f in folded if f.site.bias and f.site.bias_part == i]
        patches = [(start + offset, data) for offset, data in (*part.patches, *changed)]
        files.append(NewFile(place, pieces, patches, part.file.mode))
    return files


def data_of(part: GgufPart) -> FileRange:
    """The data of a file, with its padding."""
    return FileRange(part.file, part.data_at, part.data_length)


def _with_additions(part: GgufPart, raw: bytes, added: Sequence[_FoldedSite], text: str) -> list[bytes | FileRange]:
    """The first file with the receipt and these biases: its header, its data, and theirs."""
    header = part.header
    end = aligned(header.data_end, header.alignment)
    tensors, data, offset = b"", b"", end
    for f in added:
        numbers = raw_bytes(f.bias)
        tensors += encoded_tensor(f"{f.site.name}.bias", (len(f.bias),), F32, offset)
        data += numbers + bytes(-len(numbers) % header.alignment)
        offset = end + len(data)
    head = _new_head(header, part.data_at, raw, tensors, len(added), text)
    return [head, data_of(part), bytes(end - part.data_length) + data]


def _new_head(header: GgufHeader, data_at: int, raw: bytes, tensors: bytes, count: int, text: str) -> bytes:
    """The new header, with as much space behind the receipt as moves the data by whole blocks of the file system."""
    counts = encoded_counts(header, len(header.tensors) + count, len(header.entries) + 1)
    before, after = counts + raw[PREAMBLE_LENGTH : header.entries_end], raw[header.entries_end :] + tensors
    length = len(before) + len(encoded_text(RECEIPT_KEY, text)) + len(after)
    step = max(BLOCK_BYTES, header.alignment)
    beyond = aligned(data_at, header.alignment) % step  # where there is no data, its place may not be aligned
    length_wanted = beyond + aligned(max(0, length - beyond), step)
    return before + encoded_text(RECEIPT_KEY, text + " " * (length_wanted - length)) + after
