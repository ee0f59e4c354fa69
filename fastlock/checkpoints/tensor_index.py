"""What a checkpoint's safetensors hold and where: names, dtypes, shapes and offsets, from headers and index alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastlock.checkpoints.config import holds_another_kind
from fastlock.dtypes import BY_SAFETENSORS_NAME, SAFETENSORS_NAMES
from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.storage.files import DOWNLOAD_AGAIN, File, parse_object, read_all

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 16

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4}
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
# How a file begins that Git LFS keeps elsewhere.
_LFS = b"version https://git-lfs"
MAX_POINTER_BYTES = 1024
# The first of these are the last in a file.
_WRITTEN_LAST = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
_PLAIN_NAME = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
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
        return BY_SAFETENSORS_NAME.get(self.dtype)


@dataclass(frozen=True)
class Shards:
    """The tensors that a loader would read, by name, and the index that says so.

    Attributes:
        tensors: by name.
        index: the parsed index file, None where `model.safetensors` alone is the checkpoint.
    """

    tensors: dict[str, StoredTensor]
    index: dict[str, Any] | None

    @property
    def files(self) -> set[str]:
        """The names of the files that hold the tensors."""
        return {tensor.file for tensor in self.tensors.values()}


def read_shards(files: dict[str, Any], where: str) -> Shards:
    """The tensors of a checkpoint, as transformers finds them: `model.safetensors`, or else what the index names.

    Args:
        files: the checkpoint's files by name, each a `File`.
        where: the checkpoint, for messages.

    Raises:
        UnsupportedError: the checkpoint is in another format.
        DamagedError: index and headers are damaged, hostile or disagree.
        FastlockError: there are no tensors at all.
    """
    index = _read_index(files, where) if INDEX in files else None
    if SINGLE in files:
        if index is not None and (others := set(index["weight_map"].values()) - {SINGLE}):
            raise _two_checkpoints(others - files.keys(), where)
        return Shards(read_header(files[SINGLE], SINGLE, where), index)
    if index is None:
        raise _no_safetensors(files, where)
    return Shards(_read_headers(files, index["weight_map"], where), index)


def shard_with(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file with these tensors, byte for byte as safetensors.torch.save writes it, in a third of its time.

    Args:
        tensors: by name; contiguous, on the CPU, of a dtype that can be folded. They may share memory.
    """
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    raw = {which: tensor.view(torch.uint8).numpy().data for which, tensor in distinct.items()}
    header, order = shard_header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    return b"".join((header, *(raw[id(tensors[name])] for name in order)))


def shard_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """How a safetensors file with tensors of these dtypes and shapes begins, and in which order their bytes follow."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, end = sorted(tensors, key=lambda name: (-_WRITTEN_LAST.index(tensors[name][0]), name)), 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, order


def _read_index(files: dict[str, Any], where: str) -> dict[str, Any]:
    index = parse_object(read_all(files[INDEX], f"{where}/{INDEX}"), f"{where}/{INDEX}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError(f"{where}/{INDEX}: has no weight_map. {DOWNLOAD_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard):
            raise DamagedError(
                f"{where}/{INDEX}: says that {name[:200]!a} is in {str(shard)[:200]!a}, which is not the name of a "
                "file beside it. Do not trust this checkpoint."
            )
    return index


def _two_checkpoints(missing: set[str], where: str) -> DamagedError:
    """The error for a single file beside an index of other shards, some of which may be missing."""
    if not missing:
        return DamagedError(
            f"{where}: holds {SINGLE} and an index of other shards; which one counts depends on who loads it: "
            "transformers takes the single file, vLLM what the index names. Remove the one that is not meant."
        )
    return DamagedError(
        f"{where}: holds {SINGLE} and an index of shards that are not there ({min(missing)[:200]!a}): a model was "
        f"saved as one file over a checkpoint in shards. transformers takes {SINGLE}; others may go by the index. Save "
        f"the model into a new directory; or, to keep what was saved, remove {INDEX}, and what else is left of a "
        "relocked checkpoint: model-fastlock.safetensors and the directory fastlock."
    )


def _no_safetensors(files: Collection[str], where: str) -> FastlockError:
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in files):
        return UnsupportedError(
            f"{where}: holds .bin pickles, which can run code when they are read. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW) writes safetensors."
        )
    nothing = FastlockError(f"{where}: holds neither {SINGLE} nor {INDEX}. Give a checkpoint's directory.")
    return holds_another_kind(files, where) or nothing


def _read_headers(files: dict[str, Any], weight_map: dict[str, str], where: str) -> dict[str, StoredTensor]:
    """The tensors of all shards; each is where the index says."""
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in files:
            raise DamagedError(f"{where}: {INDEX} names {shard[:200]!a}, which is not there. Complete the checkpoint.")
        for name, tensor in read_header(files[shard], shard, where).items():
            if name in tensors:
                raise DamagedError(
                    f"{where}: {name[:200]!a} is in {tensors[name].file[:200]!a} and in {shard[:200]!a}. "
                    f"{DOWNLOAD_AGAIN}"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise DamagedError(
                f"{where}: {INDEX} says that {name[:200]!a} is in {shard[:200]!a}, which lacks it. {DOWNLOAD_AGAIN}"
            )
    return tensors


def read_header(file: File, name: str, where: str) -> dict[str, StoredTensor]:
    """The tensors of one file. Every offset is checked: nothing outside them can be read."""
    if file.size < MAX_POINTER_BYTES and file.read(0, min(file.size, len(_LFS))) == _LFS:
        raise DamagedError(f"{where}/{name}: is a Git LFS pointer, not the weights. Fetch them first: git lfs pull.")
    problem = f"{where}/{name}: is damaged"
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else file.size
    if length > file.size - 8 or length > MAX_HEADER_BYTES:
        raise DamagedError(
            f"{problem} (a header of {length} bytes in a file of {file.size}; fastlock reads headers of up to "
            f"{MAX_HEADER_BYTES >> 20} MiB). {DOWNLOAD_AGAIN}"
        )
    header = parse_object(file.read(8, length), f"{where}/{name}")
    header.pop("__metadata__", None)
    try:
        tensors = {tensor: _stored(name, entry, 8 + length) for tensor, entry in header.items()}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DamagedError(f"{problem} ({type(error).__name__}: {str(error)[:200]}). {DOWNLOAD_AGAIN}") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.length)):
        if tensor.start != end:
            raise DamagedError(f"{problem} (its tensors overlap, or leave gaps). {DOWNLOAD_AGAIN}")
        end += tensor.length
    if end != file.size:
        raise DamagedError(f"{problem} ({file.size} bytes, where its header says {end}). {DOWNLOAD_AGAIN}")
    return tensors


def _stored(file: str, entry: Any, data: int) -> StoredTensor:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    sound = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and 0 <= begin <= end
    if not sound or not _are_sizes((*shape, begin, end)):
        raise ValueError(f"shape {str(shape)[:80]}, offsets {str((begin, end))[:80]}")
    if type(entry["dtype"]) is not str:
        raise TypeError("its dtype is not text")
    bits = _BITS.get(entry["dtype"])
    if bits is None:
        raise ValueError(f"{entry['dtype'][:20]!a} is a dtype that safetensors does not know")
    if math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"{end - begin} bytes for a {entry['dtype'][:20]} of shape {str(shape)[:80]}")
    return StoredTensor(file, entry["dtype"], tuple(shape), data + begin, end - begin)


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    """Whether these are integers that a size can be; neither true nor 1.0 is one."""
    return {*map(type, numbers)} == {int} and min(numbers) >= 0 and max(numbers) < 2**63
