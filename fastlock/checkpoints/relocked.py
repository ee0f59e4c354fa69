"""What a relocked directory holds, where, and whether it is still what fastlock wrote."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.config import read_config
from fastlock.checkpoints.layout import ASIDE, NEW_SHARD, is_of_relocking, linked_name
from fastlock.checkpoints.model_card import CARD, without_section
from fastlock.checkpoints.original_columns import (
    OriginalColumns,
    digest_of_columns,
    locked_sites,
    present_columns,
)
from fastlock.checkpoints.tensor_index import INDEX, SINGLE
from fastlock.checkpoints.tokenizer import TOKENIZER_CONFIG, changed_version, same_but_class, versions_in
from fastlock.dtypes import BY_TORCH_NAME, holds
from fastlock.errors import DamagedError, shown
from fastlock.locks.receipt import CONFIG_KEY, CarrierNote, Receipt, SavedReceipt, biases_digest, raw_bytes
from fastlock.storage.byte_columns import ByteColumns
from fastlock.storage.files import CONFIG, File, InMemoryFile, parse_object, read_all
from fastlock.storage.local import LocalFile
from fastlock.storage.new_directory import NewDirectory
from fastlock.storage.places import as_place, below, file_at
from fastlock.storage.remote import RemoteDirectory, RemoteFile

Files = dict[str, LocalFile | RemoteFile | InMemoryFile]

# Where a checkpoint is written.
Target = NewDirectory | RemoteDirectory


def read_receipt(directory: str | os.PathLike[str]) -> Receipt | None:
    """The receipt in a checkpoint's config.json, None where it has none; no weights are read.

    Raises:
        UnsupportedError: the receipt in it is of a newer format.
        DamagedError: the receipt in it is damaged.
        FastlockError: there is no config.json.
    """
    place = as_place(directory)
    config = file_at(below(place, CONFIG))
    saved = receipt_in({} if config is None else {CONFIG: config}, str(place))
    return None if saved is None else saved.receipt


def was_relocked_here(files: Mapping[str, Any]) -> bool:
    """Whether `relock_checkpoint` wrote this directory (transformers keeps the receipt, but not what is set aside)."""
    return ASIDE + CONFIG in files


def original_files(files: Mapping[str, LocalFile | RemoteFile], where: str) -> Files:
    """The files of a relocked directory as they were before; those of any other directory as they are.

    Raises:
        DamagedError: it was changed since it was relocked.
    """
    if not was_relocked_here(files):
        return dict(files)
    checkpoint = Checkpoint(dict(files), where)
    patches, versions = _original_bytes(checkpoint), versions_in(checkpoint.raw)
    files = dict(files) | {name: files[name].patched(patch) for name, patch in patches.items()}
    view: Files = {name: file for name, file in files.items() if not is_of_relocking(name) and name not in versions}
    view |= {name.removeprefix(ASIDE): file for name, file in files.items() if name.startswith(ASIDE)}
    view |= {shard: files[linked_name(shard)] for shard in _original_shards(view, files, where)}
    if CARD in files:
        card = without_section(read_all(files[CARD], CARD))
        if card is None:
            view.pop(CARD)
        else:
            view[CARD] = InMemoryFile(card)
    return dict(sorted(view.items()))


def _original_shards(view: Mapping[str, Any], files: Mapping[str, Any], where: str) -> list[str]:
    """The names that the shards of the original had, as the index that was set aside says.

    Raises:
        DamagedError: one of them is not there.
    """
    index = parse_object(read_all(view[INDEX], INDEX), f"{where}/{ASIDE}{INDEX}") if INDEX in view else {}
    shards = sorted({str(shard) for shard in index.get("weight_map", {SINGLE: SINGLE}).values()})
    if missing := [shard for shard in shards if linked_name(shard) not in files]:
        raise _changed(where, f"{linked_name(missing[0])} is not there any more")
    return shards


def carry(new: Target, name: str, file: LocalFile | RemoteFile | InMemoryFile, copy: bool) -> None:
    """Put a file into a new directory under a name: linked, or copied if that is asked for or it has patches."""
    if isinstance(file, InMemoryFile):
        new.write(name, file.data)
    elif file.patches or (copy and isinstance(new, NewDirectory)):  # on another machine, links are copies
        new.copy(name, file)
    else:
        new.link(name, file)


def digest_of(file: File, where: str) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(read_all(file, where)).hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of a config.json without its receipt, however it is laid out."""
    return json_digest({key: value for key, value in config.items() if key != CONFIG_KEY})


def json_digest(data: dict[str, Any]) -> str:
    """SHA-256 of parsed JSON, however it is laid out; docs/receipt-format.md defines it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def receipt_in(files: Mapping[str, File], where: str) -> SavedReceipt | None:
    """The receipt in a checkpoint's config.json, None where it has none.

    Raises:
        UnsupportedError: the receipt in it is of a newer format.
        DamagedError: the receipt in it is damaged.
        FastlockError: there is no config.json.
    """
    raw = read_config(files, where)
    return SavedReceipt.from_dict(raw[CONFIG_KEY], f"{where}/{CONFIG}") if CONFIG_KEY in raw else None


def change_since(checkpoint: Checkpoint, saved: SavedReceipt, present_digest: str | None = None) -> str | None:
    """What was changed in a relocked checkpoint since fastlock wrote it, as a clause; None where nothing was.

    What fastlock wrote no digest of (transformers saved the checkpoint) counts as unchanged.

    Args:
        checkpoint: the checkpoint.
        saved: its receipt.
        present_digest: as `Receipt.written_digest`, of the columns of now; by default they are read for it.

    Raises:
        DamagedError: the receipt names a layer that the checkpoint lacks.
    """
    receipt, carrier = saved.receipt, saved.carrier
    if (part := _changed_part(checkpoint, receipt, present_digest)) is not None:
        return f"the locked {part} are not those that fastlock wrote"
    if (name := _changed_addition(checkpoint, receipt)) is not None:
        return f"{shown(name)}, which fastlock wrote as zeros, holds other numbers"
    if carrier.config_digest not in (None, config_digest(checkpoint.raw)):
        return f"{CONFIG} is not the one that fastlock wrote"
    if (name := changed_version(checkpoint)) is not None:
        return f"{shown(name)} is not the one that fastlock wrote"
    if _index_changed(checkpoint, carrier):
        return f"{INDEX} is not the one that fastlock wrote"
    return None


def _changed_part(checkpoint: Checkpoint, receipt: Receipt, present_digest: str | None) -> str | None:
    """Which of what carries the lock is not what fastlock wrote: biases, or weights."""
    if receipt.constant and not _holds_biases(checkpoint, receipt):
        return "biases"
    if receipt.rank:
        if present_digest is None:
            present_digest = digest_of_columns(present_columns(checkpoint, locked_sites(checkpoint, receipt)))
        return None if present_digest == receipt.written_digest else "weights"
    return None


def _holds_biases(checkpoint: Checkpoint, receipt: Receipt) -> bool:
    """Whether the biases are those that were written, as far as the dtype can tell that transformers saved them in."""
    biases = stored_biases(checkpoint, receipt)
    if not was_relocked_here(checkpoint.files):
        written = [BY_TORCH_NAME[name] for name in receipt.dtypes]
        present = [dtype if bias is None else bias.dtype for bias, dtype in zip(biases, written, strict=True)]
        if not all(map(holds, present, written)):
            return True  # rounded since: who could tell?
        biases = [None if bias is None else bias.to(dtype) for bias, dtype in zip(biases, written, strict=True)]
    return biases_digest(biases) == receipt.biases_digest


def _index_changed(checkpoint: Checkpoint, carrier: CarrierNote) -> bool:
    if not was_relocked_here(checkpoint.files) or carrier.index_digest is None:
        return False
    return carrier.index_digest != json_digest(checkpoint.shards.index or {})


def _tokenizer_changed(checkpoint: Checkpoint) -> bool:
    """Whether a tokenizer_config.json that was written anew is another one now."""
    original, where = checkpoint.files.get(ASIDE + TOKENIZER_CONFIG), f"{checkpoint.where}/{TOKENIZER_CONFIG}"
    return original is not None and not same_but_class(original, checkpoint.files.get(TOKENIZER_CONFIG), where)


def _original_bytes(checkpoint: Checkpoint) -> dict[str, list[tuple[int, bytes | ByteColumns]]]:
    """Where in which file which original bias goes, and which columns; it checks that nothing was changed since.

    Raises:
        DamagedError: something was.
    """
    saved = receipt_in(checkpoint.files, checkpoint.where)
    if saved is None:
        raise _changed(checkpoint.where, f"{CONFIG} no longer holds a receipt")
    if (change := change_since(checkpoint, saved)) is not None:
        raise _changed(checkpoint.where, change)
    if _tokenizer_changed(checkpoint):
        raise _changed(checkpoint.where, f"{TOKENIZER_CONFIG} is not the one that fastlock wrote")
    if saved.carrier.config_digest is None:
        raise _changed(checkpoint.where, f"its receipt lacks the digest of {CONFIG}")
    _check_set_aside(checkpoint, saved.carrier)
    columns: dict[str, list[tuple[int, ByteColumns]]] = {}
    if saved.receipt.rank:
        columns = OriginalColumns(checkpoint.files, checkpoint.where).patches(checkpoint, saved.receipt)
    patches: dict[str, list[tuple[int, bytes | ByteColumns]]] = {name: list(some) for name, some in columns.items()}
    for layer, original in original_biases_on_disk(checkpoint, saved).items():
        stored = checkpoint.sites[layer].bias
        if original is not None and stored is not None:
            patches.setdefault(stored.file, []).append((stored.start, raw_bytes(original)))
    return patches


def _check_set_aside(checkpoint: Checkpoint, carrier: CarrierNote) -> None:
    """Raise if a small file that was set aside is not what it was."""
    for name, digest in (carrier.set_aside or {}).items():
        file, where = checkpoint.files.get(ASIDE + name), f"{checkpoint.where}/{ASIDE}{shown(name)}"
        if file is None or digest_of(file, where) != digest:
            raise DamagedError(
                f"{where}: is not what was set aside when the checkpoint was relocked, which therefore cannot be put "
                "back. Start from the original checkpoint."
            )


def original_biases_on_disk(checkpoint: Checkpoint, saved: SavedReceipt) -> dict[int, torch.Tensor | None]:
    """The bias that each locked layer had before, None where it had none, out of the receipt.

    There is none where the lock has no constant part, and left the biases alone.

    Raises:
        DamagedError: the receipt does not hold them, or cannot be true.
    """
    if not saved.receipt.constant:
        return {}
    biases = stored_biases(checkpoint, saved.receipt)
    return {
        site.layer: _original_bias(checkpoint, saved.carrier, site.layer, bias, dtype) if site.had_bias else None
        for site, bias, dtype in zip(saved.receipt.sites, biases, saved.receipt.dtypes, strict=True)
    }


def _original_bias(
    checkpoint: Checkpoint, carrier: CarrierNote, layer: int, bias: torch.Tensor | None, dtype: str
) -> torch.Tensor:
    original = _decoded(carrier, layer, BY_TORCH_NAME[dtype])
    if original is None or bias is None or original.shape != bias.shape:
        raise DamagedError(
            f"{checkpoint.where}: the receipt does not hold the original bias of layer {layer}, which therefore "
            "cannot be put back. Download the checkpoint again, or start from the original one."
        )
    if original.count_nonzero() and carrier.had_none:  # a negative fold would hide the lock
        raise DamagedError(
            f"{checkpoint.where}: the receipt says that layer {layer} had a bias before, and that its model had no "
            "place for one. Do not trust this checkpoint: start from the original one."
        )
    return original.to(bias)


def _decoded(carrier: CarrierNote, layer: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A layer's original bias out of the receipt, None where it cannot be one."""
    try:
        return torch.frombuffer(bytearray(carrier.original_biases[layer]), dtype=dtype)
    except (KeyError, ValueError):
        return None


def stored_biases(checkpoint: Checkpoint, receipt: Receipt) -> list[torch.Tensor | None]:
    """The biases that are at a receipt's sites now, None where there is none.

    Raises:
        DamagedError: the receipt names a layer that the checkpoint lacks.
    """
    if any(site.layer >= len(checkpoint.sites) for site in receipt.sites):
        raise _changed(checkpoint.where, "its receipt names layers that it does not have")
    stored = [checkpoint.sites[site.layer].bias for site in receipt.sites]
    return [None if bias is None or bias.torch_dtype is None else checkpoint.read_vector(bias) for bias in stored]


def _changed_addition(checkpoint: Checkpoint, receipt: Receipt) -> str | None:
    """A tensor in fastlock's own shard that is neither a locked bias nor zeros, None where there is none."""
    locked = {f"{checkpoint.sites[site.layer].name}.bias" for site in receipt.sites}
    for name, stored in checkpoint.shards.tensors.items():
        if stored.file == NEW_SHARD and name not in locked:
            with checkpoint.files[NEW_SHARD].view(stored.start, stored.length) as view:
                if np.frombuffer(view, np.uint8).any():
                    return name
    return None


def _changed(where: str, change: str) -> DamagedError:
    return DamagedError(
        f"{where}: was changed since it was relocked ({change}), and putting the original back would lose that change. "
        "Start from the original checkpoint."
    )
