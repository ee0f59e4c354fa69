"""The files of a relocked GGUF as they were before: their headers made again, their data where it is now."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from fastlock.checkpoints.gguf.header import (
    PREAMBLE_LENGTH,
    GgufHeader,
    MetadataEntry,
    aligned,
    encoded_counts,
    encoded_number,
    read_header,
)
from fastlock.checkpoints.gguf.model import GgufModel
from fastlock.checkpoints.gguf.parts import SPLIT_TENSORS, GgufPart
from fastlock.checkpoints.gguf.saved import RECEIPT_KEY, GgufReceipt, OriginalFile
from fastlock.errors import DamagedError
from fastlock.locks.receipt import biases_digest
from fastlock.storage.files import InMemoryFile


def original_parts(model: GgufModel, receipt: GgufReceipt) -> list[GgufPart]:
    """A relocked model's files as they were before.

    Raises:
        DamagedError: the model was changed since, or its receipt cannot be true.
    """
    if (change := change_since(model, receipt)) is not None:
        raise DamagedError(
            f"{model.where}: was changed since it was relocked ({change}), and putting the original back would lose "
            "that change. Start from the original GGUF."
        )
    heads = _original_heads(model, receipt)
    parts = [
        _original_part(part, head, file) for part, head, file in zip(model.parts, heads, receipt.files, strict=True)
    ]
    for locked in receipt.saved.receipt.sites:
        site = model.site(locked.layer)
        if locked.had_bias and site.bias is not None and site.bias_part is not None:
            patch = (site.bias.offset, receipt.saved.carrier.original_biases[locked.layer])
            parts[site.bias_part] = replace(parts[site.bias_part], patches=(*parts[site.bias_part].patches, patch))
    return parts


def change_since(model: GgufModel, receipt: GgufReceipt) -> str | None:
    """What was changed in a relocked model since fastlock wrote it, as a clause; None where nothing was.

    The data of tensors is not looked at, but for the locked biases.

    Raises:
        DamagedError: the receipt cannot be true of this model.
    """
    kept = receipt.saved.receipt
    if any(site.layer >= model.geometry.num_hidden_layers for site in kept.sites):
        return "its receipt names layers that it does not have"
    biases = [model.read_bias(model.site(site.layer)) for site in kept.sites]
    if biases_digest(biases) != kept.biases_digest:
        return "the locked biases are not those that fastlock wrote"
    original_biases(model, receipt)
    for head, file in zip(_original_heads(model, receipt), receipt.files, strict=True):
        if len(head) != file.head_length or hashlib.sha256(head).hexdigest() != file.head_digest:
            return "its header is not the one that fastlock wrote"
    return None


def original_biases(model: GgufModel, receipt: GgufReceipt) -> dict[int, torch.Tensor | None]:
    """The bias that each locked layer had before, [hidden] float32, None where it had none.

    Raises:
        DamagedError: the receipt does not hold them.
    """
    found: dict[int, torch.Tensor | None] = {}
    for site in receipt.saved.receipt.sites:
        found[site.layer] = None
        if site.had_bias:
            data = receipt.saved.carrier.original_biases.get(site.layer, b"")
            if len(data) != 4 * model.geometry.hidden_size:
                raise DamagedError(
                    f"{model.where}: the receipt does not hold the original bias of layer {site.layer}, which "
                    "therefore cannot be put back. Start from the original GGUF."
                )
            found[site.layer] = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return found


def _original_heads(model: GgufModel, receipt: GgufReceipt) -> list[bytes]:
    """What came before the data in each file; without the padding, or with other bytes, where it was changed since."""
    added = [f"{site.name}.bias" for site in receipt.saved.receipt.sites if not site.had_bias]
    heads = []
    for i, (part, file) in enumerate(zip(model.parts, receipt.files, strict=True)):
        raw = _without_additions(part.header, added) if i == 0 else part.header.raw
        if len(model.parts) > 1:
            raw = with_split_tensors(raw, part.header, -len(added))
        padding = file.head_length - len(raw)
        heads.append(raw + bytes(padding if 0 <= padding < part.header.alignment else 0))
    return heads


def with_split_tensors(raw: bytes, header: GgufHeader, more: int) -> bytes:
    """The bytes of a header, in which there are so many more tensors in all parts, if it says how many there are."""
    entry = header.entries.get(SPLIT_TENSORS)
    if entry is None:
        return raw
    number = encoded_number(entry, max(0, (header.number(SPLIT_TENSORS) or 0) + more))
    return raw[: entry.at] + number + raw[entry.at + len(number) :]


def _without_additions(header: GgufHeader, added: list[str]) -> bytes:
    """The bytes of the first file's header without the receipt and the tensors that were added at its end."""
    entry: MetadataEntry = header.entries[RECEIPT_KEY]
    names = list(header.tensors)
    if added and names[-len(added) :] != added:
        return b""
    ends = header.tensors[added[0]].start if added else len(header.raw)
    counts = encoded_counts(header, len(names) - len(added), len(header.entries) - 1)
    return counts + header.raw[PREAMBLE_LENGTH : entry.start] + header.raw[header.entries_end : ends]


def _original_part(part: GgufPart, head: bytes, file: OriginalFile) -> GgufPart:
    where = part.header.where
    described = InMemoryFile(head)
    described.size = file.head_length + file.data_length
    header = read_header(described, where)
    there = file.data_length <= part.data_length and file.data_length <= aligned(header.data_end, header.alignment)
    if not there or header.data_end > file.data_length:
        raise DamagedError(f"{where}: the receipt is damaged (data_length). Relock the original GGUF again.")
    return replace(part, header=header, head=head, data_length=file.data_length)
