"""What a checkpoint's safetensors hold and where: names, dtypes, shapes and offsets, from headers and index alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from fastlock.errors import FastlockError
from fastlock.storage.files import File, parse_object, read_all

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 16

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4}
_PLAIN_NAME = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: the shard's name.
        dtype: as safetensors writes it ("BF16").
        shape: as stored.
        start, length: where its bytes are in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Its dtype if fastlock folds that, else None."""
        return _FLOATS.get(self.dtype)


@dataclass(frozen=True)
class Shards:
    """The tensors that a loader would read, by name, and the index that says so.

    Attributes:
        tensors: by name.
        index: the parsed index file, None where `model.safetensors` alone is the checkpoint.
    """

    tensors: dict[str, Stored]
    index: dict[str, Any] | None

    @property
    def files(self) -> set[str]:
        """The names of the files that hold the tensors."""
        return {stored.file for stored in self.tensors.values()}


def read_shards(files: dict[str, Any], where: str) -> Shards:
    """The tensors of a checkpoint, as transformers finds them: `model.safetensors`, or else what the index names.

    Args:
        files: the checkpoint's files by name, each a `File`.
        where: the checkpoint, for messages.

    Raises:
        FastlockError: there are none, or index and headers are damaged, hostile or disagree.
    """
    index = _read_index(files, where) if INDEX in files else None
    if SINGLE in files:
        if index is not None and set(index["weight_map"].values()) != {SINGLE}:
            raise FastlockError(
                f"{where}: holds {SINGLE} and an index of other shards; which one counts depends on who loads it. "
                "Remove the one that is not meant."
            )
        return Shards(_read_header(files[SINGLE], SINGLE, where), index)
    if index is None:
        raise _no_safetensors(files, where)
    weight_map = index["weight_map"]
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in files:
            raise FastlockError(f"{where}: {INDEX} names {shard}, which is not there. Complete the checkpoint.")
        for name, stored in _read_header(files[shard], shard, where).items():
            if name in tensors:
                raise FastlockError(f"{where}: {name} is in {tensors[name].file} and in {shard}. Get it again.")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise FastlockError(
                f"{where}: {INDEX} says that {name[:200]!a} is in {shard}, which lacks it. Get it again."
            )
    return Shards(tensors, index)


def _read_index(files: dict[str, Any], where: str) -> dict[str, Any]:
    index = parse_object(read_all(files[INDEX], f"{where}/{INDEX}"), f"{where}/{INDEX}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FastlockError(f"{where}/{INDEX}: has no weight_map. Get the checkpoint again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard):
            raise FastlockError(
                f"{where}/{INDEX}: {name[:200]!a} is said to be in {str(shard)[:200]!a}, which is no plain file name "
                "beside it. Don't trust this checkpoint."
            )
    return index


def _no_safetensors(files: dict[str, Any], where: str) -> FastlockError:
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in files):
        remedy = (
            "holds .bin pickles, which can run code when read. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW) writes safetensors."
        )
    elif any(name.endswith(".gguf") for name in files):
        remedy = "holds GGUF. Relock the safetensors that it was made from, and convert the result."
    elif "adapter_config.json" in files:
        remedy = "holds an adapter. Merge it first (merge_and_unload, save_pretrained), then relock."
    else:
        remedy = f"holds neither {SINGLE} nor {INDEX}. Give a checkpoint's directory."
    return FastlockError(f"{where}: {remedy}")


def _read_header(file: File, name: str, where: str) -> dict[str, Stored]:
    """The tensors of one file; every offset is checked, so that nothing outside them can be read."""
    problem = f"{where}/{name}: is damaged"
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else file.size
    if length > file.size - 8 or length > MAX_HEADER_BYTES:
        raise FastlockError(
            f"{problem} (a header of {length} bytes in a file of {file.size}; fastlock reads headers of up to "
            f"{MAX_HEADER_BYTES >> 20} MiB). Get the checkpoint again."
        )
    header = parse_object(file.read(8, length), f"{where}/{name}")
    header.pop("__metadata__", None)
    try:
        found = {tensor: _stored(name, entry, 8 + length) for tensor, entry in header.items()}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise FastlockError(
            f"{problem} ({type(error).__name__}: {str(error)[:200]}). Get the checkpoint again."
        ) from None
    end = 8 + length
    for stored in sorted(found.values(), key=lambda stored: (stored.start, stored.length)):
        if stored.start != end:
            raise FastlockError(f"{problem} (its tensors overlap, or leave gaps). Get the checkpoint again.")
        end += stored.length
    if end != file.size:
        raise FastlockError(f"{problem} ({file.size} bytes, where its header says {end}). Get the checkpoint again.")
    return found


def _stored(file: str, entry: Any, data: int) -> Stored:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    sound = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and 0 <= begin <= end
    if not sound or any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError(f"shape {str(shape)[:80]}, offsets {str((begin, end))[:80]}")
    if type(entry["dtype"]) is not str:
        raise TypeError("its dtype is no text")
    bits = _BITS.get(entry["dtype"])
    if bits is not None and math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"{end - begin} bytes for a {entry['dtype'][:20]} of shape {str(shape)[:80]}")
    return Stored(file, entry["dtype"], tuple(shape), data + begin, end - begin)
