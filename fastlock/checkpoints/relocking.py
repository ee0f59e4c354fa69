"""One checkpoint on disk: relocked or unlocked into a new directory, from its locked columns alone.

A relocked directory holds links to the files that did not change, one new small shard with the biases, and, under
`fastlock/original/`, what it holds in another form now (config, index) or would bypass the lock (weights in other
formats): copies of small files, links to large ones. `original_files` is the way back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fastlock.architectures.serving_stacks import check_stacks, named_architecture
from fastlock.checkpoints.carrier import Carrier, choose_carrier
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite, in_threads, read_config
from fastlock.checkpoints.model_card import CARD, with_section, without_section
from fastlock.checkpoints.resaved import out_of_llama_form
from fastlock.checkpoints.tensor_index import INDEX, SINGLE, Stored, read_shards
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
from fastlock.models.loading import load_model
from fastlock.models.relocking import relock, unlock
from fastlock.storage.files import CONFIG, File, Text, read_all
from fastlock.storage.local import LocalFile, local_files
from fastlock.storage.new_directory import (
    NewDirectory,
    check_absent,
    create_directory,
    create_local_directory,
    locked_in_place,
    place_of_making,
)
from fastlock.storage.places import Place, as_place, below, file_at, files_in
from fastlock.storage.remote import RemoteDirectory, RemoteFile, normalised

DEFAULT_STACKS = ("transformers", "vllm")
NEW_SHARD = "model-fastlock.safetensors"
# transformers reads `model.safetensors` alone wherever there is one, so beside a new shard it needs another name.
RENAMED = "model-00001-of-00001.safetensors"
ASIDE = "fastlock/original/"
MAX_FEATURES = 2**24
MAX_COPIED_BYTES = 2**20

# Out of the way, but not lost: weights in other formats and variants, which are without the lock and which some stacks
# prefer; and signatures, which are of the original (a new one written over the link would overwrite the source's).
_SET_ASIDE = (
    "*.bin *.bin.index.json *.bin.index.*.json *.pt *.pth *.gguf *.h5 *.msgpack *.onnx *.ot "
    "consolidated*.safetensors consolidated.safetensors.index.json "
    "model.*.safetensors model.safetensors.index.*.json *.sig"
).split()

Folds = dict[tuple[Any, ...], tuple[bytes, bytes]]
_Files = dict[str, LocalFile | RemoteFile | Text]
_NewDirectory = NewDirectory | RemoteDirectory


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
    source, out = _check_paths(source, out, in_place)
    with locked_in_place(out, in_place):
        files = original_files(files_in(source), str(source))
        checkpoint = Checkpoint(files, str(source))
        if CONFIG_KEY in checkpoint.raw:
            _check_saved(checkpoint, choose_carrier(checkpoint, stacks))
            return _relock_saved(source, lock, out, strength, in_place, stacks)
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


def unlock_checkpoint(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, copy: bool = False, in_place: bool = False
) -> None:
    """Write the checkpoint as it was before relocking into a new directory: every file, byte for byte.

    A checkpoint that transformers saved from a relocked model comes back tensor for tensor, bit for bit.

    Args:
        source, out, copy, in_place: as for `relock_checkpoint`.

    Raises:
        FastlockError: it is not relocked, or was changed since; `out` is then not there (in place: as it was).
    """
    source, out = _check_paths(source, out, in_place)
    with locked_in_place(out, in_place):
        files = files_in(source)
        if not _was_relocked_here(files):
            _unlock_saved(source, out, in_place)
            return
        originals = original_files(files, str(source))
        with create_directory(out, source, in_place) as new:
            for name, file in originals.items():
                _carry(new, name, file, copy or (ASIDE + name in files and _is_copied(new, name, file)))
            for file in originals.values():
                file.check_unchanged()


def read_receipt(directory: str | os.PathLike[str]) -> Receipt | None:
    """The receipt in a checkpoint's config.json, None where it has none; no weights are read.

    Raises:
        FastlockError: there is no config.json, or the receipt in it is damaged.
    """
    place = as_place(directory)
    config = file_at(below(place, CONFIG))
    saved = receipt_in({} if config is None else {CONFIG: config}, str(place))
    return None if saved is None else saved.receipt


def _was_relocked_here(files: Mapping[str, Any]) -> bool:
    """Whether `relock_checkpoint` wrote this directory (transformers keeps the receipt, but not what is set aside)."""
    return ASIDE + CONFIG in files


def original_files(files: Mapping[str, LocalFile | RemoteFile], where: str) -> _Files:
    """The files of a relocked directory as they were before; those of any other as they are.

    Raises:
        FastlockError: it was changed since it was relocked.
    """
    if not _was_relocked_here(files):
        return dict(files)
    patches = _original_bytes(Checkpoint(dict(files), where))
    files = dict(files) | {name: files[name].patched(patch) for name, patch in patches.items()}
    view: _Files = {name: file for name, file in files.items() if not _of_relocking(name)}
    view |= {name.removeprefix(ASIDE): file for name, file in files.items() if name.startswith(ASIDE)}
    if NEW_SHARD not in files:
        view |= {INDEX: files[INDEX]} if INDEX in files else {}
    elif RENAMED in view and (INDEX not in view or RENAMED.encode() not in read_all(view[INDEX], INDEX)):
        view[SINGLE] = view.pop(RENAMED)
    if CARD in files:
        card = without_section(read_all(files[CARD], CARD))
        if card is None:
            view.pop(CARD)
        else:
            view[CARD] = Text(card)
    return dict(sorted(view.items()))


def _of_relocking(name: str) -> bool:
    """Whether a file of a relocked directory is no file of the original: new, changed, or a signature of the new."""
    return name in (CONFIG, INDEX, NEW_SHARD) or name.startswith(ASIDE) or name.endswith(".sig")


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


def _check_paths(source: str | os.PathLike[str], out: str | os.PathLike[str], in_place: bool) -> tuple[Place, Place]:
    given, place = _resolved(source), _resolved(out)
    if in_place:
        if given != place:
            raise FastlockError(
                f"{out}: in place means into the checkpoint itself, {source}. Leave one of the two out."
            )
        if isinstance(given, str):
            raise FastlockError(f"{given}: can't be changed in place where there is no rename. Give an out of its own.")
        return given, given
    target = as_place(out)
    check_absent(target)
    if f"{place}/".startswith(f"{given}/"):
        raise FastlockError(f"{target}: is inside the checkpoint itself. Give a directory outside it.")
    if isinstance(target, str):
        return given, place
    target = target.parent.resolve() / target.name  # a link at its own name would have been found above
    if isinstance(given, Path) and given.is_relative_to(place_of_making(target)):
        raise FastlockError(f"{source}: is where {out} is made, and would be cleared away. Give it another name first.")
    return given, target


def _resolved(given: str | os.PathLike[str]) -> Place:
    place = as_place(given)
    try:
        return normalised(place) if isinstance(place, str) else place.resolve()
    except (OSError, ValueError) as error:
        raise FastlockError(f"{given}: is no usable path ({error}).") from None


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
    new: _NewDirectory,
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
        new_name = _new_name(name, bool(added), own)
        if name != CARD:
            changed = file.patched(patches[name]) if not isinstance(file, Text) and name in patches else file
            aside = new_name.startswith(ASIDE) and _is_copied(new, name, file)
            _carry(new, new_name, changed, copy or aside)
        if new_name.startswith(ASIDE) and _is_small(name, file):
            set_aside[name] = _digest(file, f"{checkpoint.where}/{name}")
    if added:
        index = _new_index(checkpoint, added)
        index_digest = _json_digest(index)
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


def _carry(new: _NewDirectory, name: str, file: LocalFile | RemoteFile | Text, copy: bool) -> None:
    if isinstance(file, Text):
        new.write(name, file.data)
    elif copy or file.patches:
        new.copy(name, file)
    else:
        new.link(name, file)


def _is_small(name: str, file: File) -> bool:
    """Whether a file that is set aside is copied and its digest noted: editing the source must not change it."""
    return name in (CONFIG, INDEX) or file.size <= MAX_COPIED_BYTES


def _is_copied(new: _NewDirectory, name: str, file: File) -> bool:
    return isinstance(new, NewDirectory) and _is_small(name, file)  # on another machine, links are copies


def _digest(file: File, where: str) -> str:
    return hashlib.sha256(read_all(file, where)).hexdigest()


def _new_name(name: str, with_new_shard: bool, own: Set[str]) -> str:
    """The name of an unchanged file in a relocked directory; `own` are the files that hold the checkpoint's tensors."""
    plain = name.rpartition("/")[2]
    if name == CONFIG or (name not in own and any(fnmatch(plain, pattern) for pattern in _SET_ASIDE)):
        return ASIDE + name
    if with_new_shard and name == INDEX:
        return ASIDE + name
    return RENAMED if with_new_shard and name == SINGLE else name


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
    shard = {file: _new_name(file, True, own) for file in own}
    weight_map = {name: shard[stored.file] for name, stored in tensors.items()}
    size = sum(stored.length for stored in tensors.values()) + sum(bias.nbytes for bias in added.values())
    index = checkpoint.shards.index or {}
    metadata = index.get("metadata")
    return index | {
        "metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": size},
        "weight_map": dict(sorted((weight_map | dict.fromkeys(added, NEW_SHARD)).items())),
    }


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of a config.json without its receipt, however it is laid out."""
    return _json_digest({key: value for key, value in config.items() if key != CONFIG_KEY})


def index_changed(checkpoint: Checkpoint, carrier: CarrierNote) -> bool:
    """Whether a relocked directory's index is another than fastlock wrote."""
    if not _was_relocked_here(checkpoint.files) or carrier.index_digest is None:
        return False
    return carrier.index_digest != _json_digest(checkpoint.shards.index or {})


def _json_digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def receipt_in(files: Mapping[str, File], where: str) -> SavedReceipt | None:
    """The receipt in a checkpoint's config.json, None where it has none.

    Raises:
        FastlockError: there is no config.json, or the receipt in it is damaged.
    """
    raw = read_config(files, where)
    return SavedReceipt.from_dict(raw[CONFIG_KEY], f"{where}/{CONFIG}") if CONFIG_KEY in raw else None


def _original_bytes(checkpoint: Checkpoint) -> dict[str, list[tuple[int, bytes]]]:
    """Where in which file which original bias goes; it checks that nothing was changed since.

    Raises:
        FastlockError: the biases or the config are not those that fastlock wrote.
    """
    saved = receipt_in(checkpoint.files, checkpoint.where)
    if saved is None:
        raise _changed(checkpoint.where, f"{CONFIG} holds no receipt any more")
    receipt, carrier = saved.receipt, saved.carrier
    if biases_digest(stored_biases(checkpoint, receipt)) != receipt.biases_digest:
        raise _changed(checkpoint.where, "the locked biases are not those that fastlock wrote")
    if (name := changed_addition(checkpoint, receipt)) is not None:
        raise _changed(checkpoint.where, f"{name}, which fastlock wrote as zeros, holds other numbers")
    if carrier.config_digest != config_digest(checkpoint.raw):
        raise _changed(checkpoint.where, f"{CONFIG} is not the one that fastlock wrote")
    if index_changed(checkpoint, carrier):
        raise _changed(checkpoint.where, f"{INDEX} is not the one that fastlock wrote")
    _check_set_aside(checkpoint, carrier)
    patches: dict[str, list[tuple[int, bytes]]] = {}
    for layer, original in original_biases_on_disk(checkpoint, saved).items():
        stored = checkpoint.sites[layer].bias
        if original is not None and stored is not None:
            patches.setdefault(stored.file, []).append((stored.start, raw_bytes(original)))
    return patches


def _check_set_aside(checkpoint: Checkpoint, carrier: CarrierNote) -> None:
    """Raise if a small file that was set aside is not what it was."""
    for name, digest in (carrier.set_aside or {}).items():
        file, where = checkpoint.files.get(ASIDE + name), f"{checkpoint.where}/{ASIDE}{name}"
        if file is None or _digest(file, where) != digest:
            raise FastlockError(
                f"{where}: is not what was set aside when it was relocked, so that it can't "
                "be put back. Start from the original checkpoint."
            )


def original_biases_on_disk(checkpoint: Checkpoint, saved: SavedReceipt) -> dict[int, torch.Tensor | None]:
    """The bias that each locked layer had before, None where it had none, out of the receipt.

    Raises:
        FastlockError: the receipt does not hold them, or can't be true.
    """
    originals: dict[int, torch.Tensor | None] = {}
    for locked, bias in zip(saved.receipt.sites, stored_biases(checkpoint, saved.receipt), strict=True):
        originals[locked.layer] = None
        if locked.had_bias:
            original = None if bias is None else _decoded(saved.carrier, locked.layer, bias.dtype)
            if original is None or bias is None or original.shape != bias.shape:
                raise FastlockError(
                    f"{checkpoint.where}: the receipt does not hold the original bias of layer {locked.layer}, so "
                    "that it can't be put back. Get the checkpoint again, or start from the original one."
                )
            if original.count_nonzero() and saved.carrier.had_none:  # a negative fold would hide the lock
                raise FastlockError(
                    f"{checkpoint.where}: the receipt says that layer {locked.layer} had a bias before, and that its "
                    "model had no place for one. Don't trust this checkpoint: start from the original one."
                )
            originals[locked.layer] = original
    return originals


def _decoded(carrier: CarrierNote, layer: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A layer's original bias out of the receipt, None where it can't be one; each has the dtype of the bias there."""
    try:
        return torch.frombuffer(bytearray(carrier.original_biases[layer]), dtype=dtype)
    except (KeyError, ValueError):
        return None


def stored_biases(checkpoint: Checkpoint, receipt: Receipt) -> list[torch.Tensor | None]:
    """The biases that are at a receipt's sites now, None where there is none.

    Raises:
        FastlockError: the receipt names a layer that the checkpoint lacks.
    """
    if any(locked.layer >= len(checkpoint.sites) for locked in receipt.sites):
        raise _changed(checkpoint.where, "its receipt names layers that it does not have")
    stored = [checkpoint.sites[locked.layer].bias for locked in receipt.sites]
    return [None if bias is None or bias.torch_dtype is None else checkpoint.read_vector(bias) for bias in stored]


def changed_addition(checkpoint: Checkpoint, receipt: Receipt) -> str | None:
    """A tensor in fastlock's own shard that is neither a locked bias nor zeros, None where there is none."""
    locked = {f"{checkpoint.sites[locked.layer].name}.bias" for locked in receipt.sites}
    for name, stored in checkpoint.shards.tensors.items():
        if stored.file == NEW_SHARD and name not in locked:
            with checkpoint.files[NEW_SHARD].view(stored.start, stored.length) as view:
                if np.frombuffer(view, np.uint8).any():
                    return name
    return None


def _changed(where: str, what: str) -> FastlockError:
    return FastlockError(
        f"{where}: {what}: it was changed since it was relocked, and putting the original back would lose that. "
        "Start from the original checkpoint."
    )


def _json(data: dict[str, Any]) -> bytes:
    """JSON as UTF-8; lone surrogates, which UTF-8 can't hold, are escaped, and all else outside ASCII with them."""
    try:
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(data, indent=2) + "\n").encode()


def _relock_saved(
    source: Place, lock: Lock, out: Place, strength: float, in_place: bool, stacks: tuple[str, ...]
) -> Receipt:
    """Relock a checkpoint that transformers saved from a relocked model: its biases are among its other weights."""
    source, out = _both_here(source, out)
    model = load_model(source)
    receipt = relock(model, lock, strength)
    receipt.to_dict()  # takes its digests while the model is there
    _save(model, source, out, in_place, receipt, stacks)
    return receipt


def _unlock_saved(source: Place, out: Place, in_place: bool) -> None:
    source, out = _both_here(source, out)
    model = load_model(source)
    saved = receipt_in(local_files(source), str(source))
    unlock(model)
    if saved is not None and saved.carrier.form == "llama":
        model = out_of_llama_form(model, saved.carrier.original_config, source)
    _save(model, source, out, in_place, None, ())


def _check_saved(checkpoint: Checkpoint, carrier: Carrier) -> None:
    """Raise if transformers, which will save it, would not write what the carrier needs."""
    needed = named_architecture(carrier.config)
    if named_architecture(checkpoint.raw) != needed:
        raise FastlockError(
            f"{checkpoint.where}: was saved by transformers from a relocked model; vllm keeps the lock only where "
            f"{CONFIG} names {needed}, which transformers does not write. `fastlock unlock` it first, and relock the "
            "result; or relock it --for transformers. Nothing was written."
        )


def _both_here(source: Place, out: Place) -> tuple[Path, Path]:
    if isinstance(source, str) or isinstance(out, str):
        raise FastlockError(
            f"{source}: was saved by transformers from a relocked model, so that all of it has to be loaded and "
            "written anew. Download it, do this on local directories, and upload the result."
        )
    return source, out


def _save(
    model: Any, source: Path, out: Path, in_place: bool, receipt: Receipt | None, stacks: tuple[str, ...]
) -> None:
    """Save a model, with everything else that is in the directory that it was loaded from.

    Args:
        model: relocked or unlocked.
        source, out, in_place: as for `relock_checkpoint`.
        receipt: what was done; None where it was unlocked, and what was set aside comes back.
        stacks: for the model card.
    """
    files = local_files(source)
    shards = read_shards(dict(files), str(source)).files
    with create_local_directory(out, source, in_place) as new:
        try:
            model.save_pretrained(new.path)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from None
        new.sync()
        anew = {*shards, INDEX, CARD, *local_files(new.path)}
        for name in sorted(files, key=lambda name: not name.startswith(ASIDE)):  # what is set aside is the original's
            target = _saved_name(name, shards, receipt is not None)
            if not {name, target} & anew:
                _carry(new, target, files[name], target.startswith(ASIDE) and _is_copied(new, name, files[name]))
                anew.add(target)
        card = without_section(read_all(files[CARD], CARD)) if CARD in files else None
        if receipt is not None:
            card = with_section(card, receipt, stacks)
        if card is not None:
            new.write(CARD, card)


def _saved_name(name: str, shards: Set[str], locked: bool) -> str:
    if name.startswith(ASIDE):
        return name if locked else name.removeprefix(ASIDE)
    return _new_name(name, False, shards) if locked else name
