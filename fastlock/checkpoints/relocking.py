"""One checkpoint on disk: relocked or unlocked into a new directory, from its locked columns alone.

A relocked directory holds links to the files that did not change, one new small shard with the biases, and, under
`fastlock/original/`, what it holds in another form now (config, index) or would bypass the lock (weights in other
formats): copies of small files, links to large ones. `original_files` is the way back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from fastlock.architectures.serving_stacks import DEFAULT_STACKS, check_stacks
from fastlock.checkpoints.carrier import Carrier, choose_carrier
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite, in_threads
from fastlock.checkpoints.model_card import CARD, with_section
from fastlock.checkpoints.relocked import (
    ASIDE,
    NEW_SHARD,
    RENAMED,
    Making,
    carry,
    config_digest,
    digest_of,
    is_copied,
    is_small,
    json_digest,
    name_when_relocked,
    original_files,
)
from fastlock.checkpoints.resaved import check_saved, relock_saved
from fastlock.checkpoints.tensor_index import INDEX, Stored
from fastlock.errors import FastlockError
from fastlock.fold import Fold, fold
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for
from fastlock.locks.receipt import (
    CONFIG_KEY,
    CarrierNote,
    KnownDigests,
    LockedSite,
    Receipt,
    SavedReceipt,
    biases_digest,
    raw_bytes,
    weights_digest,
)
from fastlock.storage.files import CONFIG, InMemoryFile, read_all
from fastlock.storage.new_directory import (
    check_paths,
    create_directory,
    locked_in_place,
)
from fastlock.storage.places import files_in

MAX_FEATURES = 2**24


Folds = dict[tuple[Any, ...], tuple[bytes, bytes]]


@dataclass(frozen=True)
class _Folded:
    """One site's new bias, what was there before, and the digest of the columns read."""

    site: StoredSite
    heads: tuple[int, ...]
    bias: torch.Tensor
    original: torch.Tensor | None
    digest: bytes


def relock_checkpoint(
    source: str | os.PathLike[str],
    lock: Lock,
    out: str | os.PathLike[str],
    strength: float | None = None,
    *,
    stacks: Sequence[str] = DEFAULT_STACKS,
    copy: bool = False,
    in_place: bool = False,
    folds: Folds | None = None,
) -> Receipt:
    """Relock a checkpoint into a new directory that is complete, reading its headers and locked columns only.

    Unchanged files are linked (shared blocks where the file system has them, else hard links, else symbolic links).
    A checkpoint that is relocked already gets this lock instead of the earlier one.

    Both may be URLs of any fsspec file system ("s3://bucket/model"). Only headers and the locked layers' projections
    are fetched then; files that stay on one file system are copied by it.

    Args:
        source: the checkpoint's directory (a Hugging Face cache snapshot is one), which is only read.
        lock: the lock of its aligned base.
        out: the directory to make; it must not exist yet, unless `in_place`.
        strength: the paper's α, 0 or more; by default as for `fastlock.relock`.
        stacks: the serving stacks in which the lock must act, of `fastlock.stacks.STACKS`.
        copy: copy the files instead of linking them.
        in_place: `out` is `source`; the new directory takes its place in one step, and `unlock_checkpoint` undoes it.
        folds: folds of this lock and strength that were made before, by projection; looked up and added to, for
            checkpoints that share files.

    Returns:
        What was done.

    Raises:
        FastlockError: the checkpoint is damaged or of another geometry, no carrier acts in all stacks, or `out` can't
            be written. `out` is then not there (at a URL: holds no config.json); in place, it is as it was.
    """
    check_lock(lock)
    strength, stacks = strength_for(lock, strength), check_stacks(stacks)
    source, out = check_paths(source, out, in_place)
    with locked_in_place(out, in_place):
        files = original_files(files_in(source), str(source))
        checkpoint = Checkpoint(files, str(source))
        if CONFIG_KEY in checkpoint.raw:
            check_saved(checkpoint, choose_carrier(checkpoint, stacks))
            return relock_saved(source, lock, out, strength, in_place, stacks)
        _check_names(checkpoint)
        sites = checkpoint.sites_for(lock)
        carrier = choose_carrier(checkpoint, stacks)
        _check_switched_off(checkpoint, carrier)
        folded = _fold(checkpoint, sites, lock, strength, {} if folds is None else folds)
        receipt = _receipt(checkpoint, lock, strength, folded)
        with create_directory(out, source, in_place) as new:
            _write_relocked(new, checkpoint, carrier, receipt, folded, stacks, copy)
            checkpoint.check_unchanged()
        return receipt


def _check_names(checkpoint: Checkpoint) -> None:
    """Raise if files of the checkpoint's own have names that a relocked directory needs."""
    for name in checkpoint.files:
        stray = name == RENAMED and name not in checkpoint.shards.files
        if name.partition("/")[0] == "fastlock" or name == NEW_SHARD or stray:
            raise FastlockError(
                f"{checkpoint.where}: holds {name[:200]!a}, and fastlock needs that name for files of its own. Move it "
                "away; if fastlock wrote it, start from the original checkpoint. Nothing was written."
            )


def _check_switched_off(checkpoint: Checkpoint, carrier: Carrier) -> None:
    """Raise if relocking would switch on biases that are in the files, but not in the model as its config has it."""
    head = {"lm_head"} & set(carrier.switched)
    modules = [] if carrier.was else [*checkpoint.modules(carrier.switched), *head]
    if carrier.form == "llama":  # the model's own class has no place for the projection's bias, whatever the flag
        modules += [site.name for site in checkpoint.sites]
    found = sorted({f"{path}.bias" for path in modules} & checkpoint.shards.tensors.keys())
    if found:
        raise FastlockError(
            f"{checkpoint.where}: holds biases that its config switches off ({found[0][:200]!a}, {len(found)} in all), "
            "and relocking would switch them on. Start from the original checkpoint, or remove them. Nothing was "
            "written."
        )


def _fold(checkpoint: Checkpoint, sites: list[StoredSite], lock: Lock, strength: float, folds: Folds) -> list[_Folded]:
    displacements = lock.displacement(strength)

    def one(site: StoredSite) -> _Folded:
        return _fold_site(checkpoint, site, displacements[site.layer], (lock.digest, strength), folds)

    return in_threads(one, sites)


def _fold_site(
    checkpoint: Checkpoint, site: StoredSite, displacement: Displacement, of_lock: tuple[str, float], folds: Folds
) -> _Folded:
    original = None if site.bias is None else checkpoint.read_vector(site.bias)
    before = None if original is None else raw_bytes(original)
    key = (checkpoint.files[site.weight.file].identity, site.weight.start, before, *of_lock)
    if key not in folds:
        read = checkpoint.read_columns(site, displacement.heads)
        (bias,) = fold([Fold(read.columns, displacement.values, original, f"{checkpoint.where}: {site.name}")])
        folds[key] = raw_bytes(bias), read.digest
    data, digest = folds[key]
    return _Folded(site, displacement.heads, torch.frombuffer(bytearray(data), dtype=site.dtype), original, digest)


def _receipt(checkpoint: Checkpoint, lock: Lock, strength: float, folded: list[_Folded]) -> Receipt:
    return Receipt(
        lock_digest=lock.digest,
        strength=strength,
        model_type=checkpoint.kind,
        dtype=str(folded[0].site.dtype).removeprefix("torch."),
        sites=tuple(LockedSite(f.site.layer, f.site.name, f.heads, f.original is not None) for f in folded),
        digests=KnownDigests(weights_digest(f.digest for f in folded), biases_digest(f.bias for f in folded)),
    )


def _write_relocked(
    new: Making,
    checkpoint: Checkpoint,
    carrier: Carrier,
    receipt: Receipt,
    folded: list[_Folded],
    stacks: tuple[str, ...],
    copy: bool,
) -> None:
    added = _added_biases(checkpoint, carrier, folded)
    own = checkpoint.shards.files
    set_aside: dict[str, str] = {}
    index_digest: str | None = None
    patches: dict[str, list[tuple[int, bytes]]] = {}
    for f in folded:
        if f.site.bias is not None:
            patches.setdefault(f.site.bias.file, []).append((f.site.bias.start, raw_bytes(f.bias)))
    for name, file in checkpoint.files.items():
        new_name = name_when_relocked(name, bool(added), own)
        if name != CARD:
            changed = file.patched(patches[name]) if not isinstance(file, InMemoryFile) and name in patches else file
            aside = new_name.startswith(ASIDE) and is_copied(new, name, file)
            carry(new, new_name, changed, copy or aside)
        if new_name.startswith(ASIDE) and is_small(name, file):
            set_aside[name] = digest_of(file, f"{checkpoint.where}/{name}")
    if added:
        index = _new_index(checkpoint, added)
        index_digest = json_digest(index)
        new.write(NEW_SHARD, safetensors.torch.save(added, metadata={"format": "pt"}))
        new.write(INDEX, _json(index))
    card = checkpoint.files.get(CARD)
    new.write(CARD, with_section(None if card is None else read_all(card, CARD), receipt, stacks))
    note = CarrierNote(
        form=carrier.form,
        flag=carrier.flag,
        was=carrier.was,
        original_biases={f.site.layer: raw_bytes(f.original) for f in folded if f.original is not None},
        stacks=stacks,
        original_config=checkpoint.raw if carrier.form == "llama" else None,
        config_digest=config_digest(carrier.config),
        index_digest=index_digest,
        set_aside=set_aside,
    )
    new.write(CONFIG, _json(carrier.config | {CONFIG_KEY: SavedReceipt(receipt, note).to_dict()}))


def _added_biases(checkpoint: Checkpoint, carrier: Carrier, folded: list[_Folded]) -> dict[str, torch.Tensor]:
    """The biases that the checkpoint lacks: the folds, and zeros wherever the carrier's flag asks for one.

    vLLM leaves biases that it does not find uninitialised.
    """
    tensors, dtype = checkpoint.shards.tensors, folded[0].site.dtype
    added = {f"{f.site.name}.bias": f.bias for f in folded if f.site.bias is None}
    lengths = {path: _out_features(stored, checkpoint) for path, stored in checkpoint.modules(carrier.switched).items()}
    if "lm_head" in carrier.switched:
        lengths["lm_head"] = checkpoint.text_config.vocab_size
    for path, length in lengths.items():
        if f"{path}.bias" not in tensors:
            added.setdefault(f"{path}.bias", torch.zeros(length, dtype=dtype, device="cpu"))
    return added


def _out_features(stored: Stored, checkpoint: Checkpoint) -> int:
    length = stored.shape[0] if len(stored.shape) == 2 else 0
    if not 0 < length <= min(stored.length, MAX_FEATURES):
        raise FastlockError(
            f"{checkpoint.where}: a projection in {stored.file} has the shape {list(stored.shape)}. Get it again."
        )
    return length


def _new_index(checkpoint: Checkpoint, added: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors = checkpoint.shards.tensors
    own = checkpoint.shards.files
    shard = {file: name_when_relocked(file, True, own) for file in own}
    weight_map = {name: shard[stored.file] for name, stored in tensors.items()}
    size = sum(stored.length for stored in tensors.values()) + sum(bias.nbytes for bias in added.values())
    index = checkpoint.shards.index or {}
    metadata = index.get("metadata")
    return index | {
        "metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": size},
        "weight_map": dict(sorted((weight_map | dict.fromkeys(added, NEW_SHARD)).items())),
    }


def _json(data: dict[str, Any]) -> bytes:
    """JSON as UTF-8; lone surrogates, which UTF-8 can't hold, are escaped, and all else outside ASCII with them."""
    try:
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(data, indent=2) + "\n").encode()
