"""A checkpoint on disk, relocked into a new directory from its locked columns alone.

A relocked directory holds links to the files that did not change, one new small shard with the biases, and, under
`fastlock/original/`, what it holds in another form now (config, index) or would bypass the lock (weights in other
formats): copies of small files, links to large ones. Of a gate, it holds the shards that the gate was written into, and
the columns that these had before. `original_files` is the way back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastlock.architectures.serving_stacks import DEFAULT_STACKS, check_stacks
from fastlock.basis import check_likeness
from fastlock.checkpoints.base import base_of, shape_of, warn_unless_known
from fastlock.checkpoints.carrier import Carrier, choose_carrier
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.folding import FoldedSite, FoldedSites, Folds, fold_sites, helpers
from fastlock.checkpoints.layout import (
    ASIDE,
    COLUMNS_FILE,
    NEW_SHARD,
    Placement,
    is_small,
    linked_name,
    needs_name,
    placements_of,
)
from fastlock.checkpoints.model_card import CARD, with_section
from fastlock.checkpoints.original_columns import kept_columns, patches_of
from fastlock.checkpoints.relocked import (
    Target,
    carry,
    config_digest,
    digest_of,
    json_digest,
    original_files,
    receipt_in,
)
from fastlock.checkpoints.resaved import check_saved, check_without_gate, relock_saved
from fastlock.checkpoints.tensor_index import INDEX, shard_with
from fastlock.dtypes import torch_name
from fastlock.errors import DamagedError, FastlockError, is_unicode
from fastlock.locks.lock import Lock, check_lock, strength_for
from fastlock.locks.receipt import (
    CONFIG_KEY,
    CarrierNote,
    KnownDigests,
    LockedSite,
    Receipt,
    SavedReceipt,
    raw_bytes,
)
from fastlock.storage.byte_columns import ByteColumns
from fastlock.storage.files import CONFIG, InMemoryFile, read_all
from fastlock.storage.new_directory import check_not_in_the_way, check_paths, create_directory, locked_in_place
from fastlock.storage.places import files_in


@dataclass(frozen=True)
class _Relocked:
    """A relocked checkpoint, ready to be written."""

    checkpoint: Checkpoint
    carrier: Carrier
    receipt: Receipt
    folded: list[FoldedSite]
    stacks: tuple[str, ...]
    copy: bool
    in_place: bool


def relock_checkpoint(
    source: str | os.PathLike[str],
    lock: Lock,
    out: str | os.PathLike[str],
    strength: float | None = None,
    *,
    stacks: Sequence[str] = DEFAULT_STACKS,
    copy: bool = False,
    in_place: bool = False,
    base: str | os.PathLike[str] | None = None,
    folds: Folds | None = None,
) -> Receipt:
    """Relock a checkpoint into a new directory that is complete, reading its headers and locked columns only.

    The constant part of a lock goes into biases. A gate goes into the weights of the locked output projections, which
    every stack and every family uses: the shards that hold them are copies (of shared blocks where the file system has
    them) with new columns, and the columns that were there are kept beside them.

    Weights that do not change are linked (shared blocks where the file system has them, else hard links, else symbolic
    links), under names that no saver writes; everything else is copied. Nobody writes to the source through it. Weights
    that would be loaded without the lock are set aside; version control and caches stay behind. A checkpoint that is
    relocked already gets this lock instead of the earlier one.

    Both may be URLs of any fsspec file system ("s3://bucket/model"). Then only headers and the locked layers'
    projections are fetched, and files that stay on one file system are copied by it.

    Args:
        source: the checkpoint's directory (a Hugging Face cache snapshot is one), which is only read.
        lock: the lock of its aligned base.
        out: the directory to make; it must not exist yet, unless `in_place`.
        strength: the paper's α, 0 or more; by default as for `fastlock.relock`.
        stacks: the serving stacks in which the lock must act, of "transformers", "vllm", "sglang" and "llama.cpp".
        copy: copy the weights, too, instead of linking them.
        in_place: `out` is `source`; the new directory takes its place in one step, and `unlock_checkpoint` undoes it.
        base: the directory or URL of the lock's aligned base, whose locked columns are then compared with the
            checkpoint's, as a quantiser may have rotated or scaled its heads. By default their norms are compared with
            those that the lock carries; if it carries none and there are traces of a quantiser, a FastlockWarning says
            that the basis was not checked.
        folds: folds that were made before; looked up and added to, for checkpoints that share files.

    Returns:
        What was done.

    Raises:
        UnsupportedError: the fold is not exact in this family, its format is not safetensors, no form of the checkpoint
            keeps the lock in all of the stacks, or its heads are not in the basis that the lock was found in; or the
            lock has a gate, and the weights are quantised, or were saved by transformers with a lock in them.
        DamagedError: the checkpoint is damaged, hostile, or was changed (since it was relocked, or meanwhile).
        MismatchError: the lock is of another geometry.
        FastlockError: an argument is wrong, or the file system or the network refuses.

    After an error `out` does not exist (at a URL: it holds no config.json); in place, it is as it was. What goes wrong
    once the result is complete, such as removing the old directory in place, is a FastlockWarning.
    """
    check_lock(lock)
    strength, stacks = strength_for(lock, strength), check_stacks(stacks)
    source, out = check_paths(source, out, in_place)
    if base is not None:
        check_not_in_the_way(base, out)
    with locked_in_place(out, in_place):
        checkpoint = Checkpoint(original_files(files_in(source), str(source)), str(source))
        if CONFIG_KEY in checkpoint.raw:
            check_without_gate(receipt_in(checkpoint.files, checkpoint.where), checkpoint.where, lock)
            check_saved(checkpoint, choose_carrier(checkpoint, stacks))
            _check_not_given(base, checkpoint)
            return relock_saved(source, lock, out, strength, in_place, stacks)
        _check_names(checkpoint)
        sites = checkpoint.sites_for(lock)
        carrier = choose_carrier(checkpoint, stacks, lock.has_constant)
        _check_switched_off(checkpoint, carrier)
        known = {} if folds is None else folds
        of_base = base_of(lock, base, shape_of(checkpoint), checkpoint.where)
        with helpers() as threads:
            folded = fold_sites(checkpoint, sites, lock, strength, known, threads, of_base)
            check_likeness([f.likeness for f in folded.sites], checkpoint.where)
            receipt = _receipt(checkpoint, lock, strength, folded)
            with create_directory(out, source, in_place) as new:
                _write(new, _Relocked(checkpoint, carrier, receipt, folded.sites, stacks, copy, in_place))
                checkpoint.check_unchanged()
            known |= folded.known()
        warn_unless_known(of_base, checkpoint)
        known_digests = KnownDigests(receipt.weights_digest, receipt.biases_digest, receipt.written_digest)
        return replace(receipt, digests=known_digests)


def _check_not_given(base: object, checkpoint: Checkpoint) -> None:
    if base is not None:
        raise FastlockError(
            f"{checkpoint.where}: was saved by transformers from a relocked model, and is not compared with a base. "
            "`fastlock unlock` it first, and relock the result. Nothing was written."
        )


def _check_names(checkpoint: Checkpoint) -> None:
    """Raise if the checkpoint's own files have names that a relocked directory needs."""
    for name in checkpoint.files:
        if needs_name(name):
            raise FastlockError(
                f"{checkpoint.where}: holds {name[:200]!a}, and fastlock needs that name for its own files. Move it "
                "away; if fastlock wrote it, start from the original checkpoint. Nothing was written."
            )


def _check_switched_off(checkpoint: Checkpoint, carrier: Carrier) -> None:
    """Raise if relocking would switch on biases that are in the files, but not in the model as its config has it."""
    biases = carrier.switched_off(checkpoint)
    if biases:
        raise DamagedError(
            f"{checkpoint.where}: holds biases that its config switches off ({biases[0][:200]!a}, {len(biases)} in "
            "all), and relocking would switch them on. Start from the original checkpoint, or remove them. Nothing was "
            "written."
        )


def _receipt(checkpoint: Checkpoint, lock: Lock, strength: float, folded: FoldedSites) -> Receipt:
    dtypes = [torch_name(f.site.dtype) for f in folded.sites]
    receipt = Receipt(
        lock_digest=lock.digest,
        strength=strength,
        model_type=checkpoint.model_type,
        dtype=dtypes[0],
        sites=tuple(LockedSite(f.site.layer, f.site.name, f.heads, f.original is not None) for f in folded.sites),
        rank=lock.rank,
        constant=lock.has_constant,
        digests=folded,
    )
    return receipt.with_dtypes(dtypes)


def _write(new: Target, relocked: _Relocked) -> None:
    """Write the whole directory, its config.json last."""
    checkpoint, folded = relocked.checkpoint, relocked.folded
    added = _added_biases(checkpoint, relocked.carrier, folded)
    set_aside = _carry_files(new, relocked)
    rewritten = [(f.site, f.heads) for f in folded if f.rewritten is not None]
    if rewritten:
        new.write_parts(COLUMNS_FILE, kept_columns(checkpoint, rewritten))
    index_digest = _write_index(new, checkpoint, added)
    card = checkpoint.files.get(CARD)
    new.write(CARD, with_section(None if card is None else read_all(card, CARD), relocked.receipt, relocked.stacks))
    carrier = relocked.carrier
    note = CarrierNote(
        form=carrier.form,
        flag=carrier.flag,
        was=carrier.was,
        original_biases={
            f.site.layer: raw_bytes(f.original) for f in folded if f.original is not None and f.bias is not None
        },
        stacks=relocked.stacks,
        original_config=checkpoint.raw if carrier.form == "llama" else None,
        config_digest=config_digest(carrier.config),
        index_digest=index_digest,
        set_aside=set_aside,
    )
    for name, data in carrier.rewritten.items():
        new.write(name, _json(data))
    saved = {CONFIG_KEY: SavedReceipt(relocked.receipt, note).to_dict()}
    for name, config in (carrier.versions | {CONFIG: carrier.config}).items():
        new.write(name, _json(config | saved))


def _carry_files(new: Target, relocked: _Relocked) -> dict[str, str]:
    """Put every file of the checkpoint in its place, with new biases and columns in those that held the old ones.

    Returns:
        The digests of the small files that were set aside, by name.
    """
    checkpoint = relocked.checkpoint
    patches = _patches(relocked)
    set_aside: dict[str, str] = {}
    placements = placements_of(checkpoint.files, checkpoint.shards.files, relocked.in_place)
    placements |= {name: Placement(ASIDE + name, linked=False) for name in relocked.carrier.rewritten}
    for name, placement in placements.items():
        file = checkpoint.files[name]
        if name != CARD:
            changed = file.patched(patches[name]) if not isinstance(file, InMemoryFile) and name in patches else file
            carry(new, placement.name, changed, relocked.copy or not placement.linked)
        if placement.aside and is_small(name, file):
            set_aside[name] = digest_of(file, f"{checkpoint.where}/{name}")
    return set_aside


def _patches(relocked: _Relocked) -> dict[str, list[tuple[int, bytes | ByteColumns]]]:
    """What is written anew in the checkpoint's own files: where in which of them."""
    of_lock = f"{relocked.receipt.lock_digest} {relocked.receipt.strength!r}"
    columns = patches_of(
        (f.site, f.heads, of_lock, f.rewritten.columns) for f in relocked.folded if f.rewritten is not None
    )
    patches: dict[str, list[tuple[int, bytes | ByteColumns]]] = {name: list(some) for name, some in columns.items()}
    for f in relocked.folded:
        if f.site.bias is not None and f.bias is not None:
            patches.setdefault(f.site.bias.file, []).append((f.site.bias.start, raw_bytes(f.bias)))
    return patches


def _write_index(new: Target, checkpoint: Checkpoint, added: dict[str, torch.Tensor]) -> str:
    """Write the shard with the biases that the checkpoint lacks, and the index of all shards; the index's digest."""
    index = _new_index(checkpoint, added)
    if added:
        new.write(NEW_SHARD, shard_with(added))
    new.write(INDEX, _json(index))
    return json_digest(index)


def _added_biases(checkpoint: Checkpoint, carrier: Carrier, folded: list[FoldedSite]) -> dict[str, torch.Tensor]:
    """The biases that the checkpoint lacks: the folds, and zeros wherever the carrier's flag asks for one.

    vLLM leaves biases that it does not find uninitialised.
    """
    tensors, dtype = checkpoint.shards.tensors, folded[0].site.dtype
    added = {f"{f.site.name}.bias": f.bias for f in folded if f.site.bias is None and f.bias is not None}
    lengths = checkpoint.modules(carrier.switched)
    if "lm_head" in carrier.switched:
        lengths["lm_head"] = checkpoint.text_config.vocab_size
    zeros = {length: torch.zeros(length, dtype=dtype, device="cpu") for length in set(lengths.values())}
    for path, length in lengths.items():
        if f"{path}.bias" not in tensors:
            added.setdefault(f"{path}.bias", zeros[length])
    return added


def _new_index(checkpoint: Checkpoint, added: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors = checkpoint.shards.tensors
    weight_map = {name: linked_name(tensor.file) for name, tensor in tensors.items()}
    size = sum(tensor.length for tensor in tensors.values()) + sum(bias.nbytes for bias in added.values())
    index = checkpoint.shards.index or {}
    metadata = index.get("metadata")
    return index | {
        "metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": size},
        "weight_map": dict(sorted((weight_map | dict.fromkeys(added, NEW_SHARD)).items())),
    }


def _json(data: dict[str, Any]) -> bytes:
    """JSON as UTF-8; if there is a lone surrogate, which UTF-8 cannot hold, all but ASCII is escaped."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if not is_unicode(text):
        text = json.dumps(data, indent=2)
    return (text + "\n").encode()
