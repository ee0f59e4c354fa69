"""The file of a lock: safetensors in one canonical form, specified in docs/lock-format.md.

What is read here is a sound file of the right tensors; whether its rows can be used is for `Lock` to say.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.storage.files import json_object

FORMAT = "fastlock-lock"
# A lock with a tensor of `GATE` or `OPTIONAL` is of the second version, any other one of the first.
FORMAT_VERSIONS = ("1", "2")
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024

# The tensors, in the order in which the digest takes them.
TENSORS = {"layers": torch.int32, "heads": torch.int32, "directions": torch.float32, "scales": torch.float32}
# Those of a gate, which the digest takes after them; a lock has both or none.
GATE = {"readers": torch.float32, "writers": torch.float32}
# Those that a lock may have besides; the digest leaves them out, and each has one of its own in the metadata.
OPTIONAL = {"column_norms": torch.float32}
# The key of the metadata that has the digest of the rows.
DIGEST = "lock_digest"
# The metadata about the base, and about where the lock comes from.
GEOMETRY = ("num_layers", "num_heads", "head_dim", "hidden_size")
PROVENANCE = ("base_model", "recipe", "extraction_digest", "fastlock_version", "calibration")

# The tensors as a file holds them: in the order in which the safetensors library lays them out.
_STORED = dict.fromkeys(("column_norms", "directions", "readers", "scales", "writers"), "F32") | {
    "heads": "I32",
    "layers": "I32",
}


def little_endian(tensor: torch.Tensor) -> bytes:
    """The numbers of a CPU tensor, row by row, as files and digests take them on every machine."""
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def serialized(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a lock's file: the same tensors and metadata give the same bytes, everywhere and always.

    Args:
        tensors: by name, those of `TENSORS`, and what there is of `GATE` and `OPTIONAL`, on the CPU.
        metadata: without the format and its version.
    """
    version = FORMAT_VERSIONS[not tensors.keys() <= TENSORS.keys()]
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "format_version": version, **metadata}}
    body = b""
    for name, dtype in _STORED.items():
        if name not in tensors:
            continue
        offset = len(body)
        body += little_endian(tensors[name])
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, len(body)]}
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + body


def read(data: bytes, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of the `Lock` in a file, and the digests that the file says it has.

    Args:
        data: the file's bytes.
        where: the file's name, for messages.

    Returns:
        The four tensors of `TENSORS`, and what there is of `GATE` and `OPTIONAL`, of geometry (int), provenance (str)
        and strength (the text of a decimal), by the names of `Lock`'s fields; the digests in hex, those that the file
        has, by key.

    Raises:
        UnsupportedError: the file is of a newer format.
        DamagedError: it is damaged.
        FastlockError: it is safetensors, but not a lock.
    """
    header = _header(data, where)
    metadata = header.pop("__metadata__", None)
    version = _checked_version(metadata, where)
    optional = {} if version == FORMAT_VERSIONS[0] else GATE | OPTIONAL
    if not TENSORS.keys() <= header.keys() <= TENSORS.keys() | optional.keys():
        names = ", ".join(sorted(header))[:200] or "nothing"
        raise DamagedError(
            f"{where}: a lock holds {', '.join(TENSORS)}{''.join(f', and may hold {name}' for name in optional)}; this "
            f"file holds {names}. It is damaged: download it again."
        )
    fields: dict[str, Any] = _tensors(data, where)
    fields |= {name: metadata[name] for name in (*PROVENANCE, "strength") if name in metadata}
    fields |= {name: _integer(metadata[name], name, where) for name in GEOMETRY if name in metadata}
    return fields, {name: metadata[name] for name in (DIGEST, *map(digest_key, OPTIONAL)) if name in metadata}


def digest_key(name: str) -> str:
    """The key of the metadata under which an optional tensor has its digest."""
    return f"{name}_digest"


def _header(data: bytes, where: str) -> dict[str, Any]:
    """The file's JSON header, before the library makes a tensor of everything that it declares."""
    try:
        size = int.from_bytes(data[:8], "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes, where a lock has at most {MAX_HEADER_BYTES}")
        if size > len(data) - 8:
            raise ValueError("it ends inside its header")
        return json_object(data[8 : 8 + size])
    except ValueError as error:
        raise _unreadable(where, error) from None


def _checked_version(metadata: Any, where: str) -> str:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FastlockError(
            f"{where}: a safetensors file, but not a lock (its metadata lacks format={FORMAT!r}). "
            "Give the lock file, not a checkpoint."
        )
    version = metadata.get("format_version")
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(repr, FORMAT_VERSIONS))
        raise UnsupportedError(
            f"{where}: lock format version {str(version)[:40]!r}; this fastlock reads {known}. Upgrade fastlock."
        )
    return str(version)


def _tensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _unreadable(where, error) from None
    for name, dtype in (TENSORS | GATE | OPTIONAL).items():
        if name in tensors and tensors[name].dtype != dtype:
            raise DamagedError(
                f"{where}: `{name}` is {tensors[name].dtype}, but should be {dtype}. The file is damaged: download it "
                "again."
            )
    return tensors


def _integer(text: str, name: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise DamagedError(
            f"{where}: metadata `{name}` is {text[:40]!r}, but must be a positive integer. The file is damaged: "
            "download it again."
        )
    return int(text)


def _unreadable(where: str, error: Exception) -> DamagedError:
    return DamagedError(
        f"{where}: neither a fastlock lock (safetensors) nor a released .safelock file ({str(error)[:200]}). "
        "Check that the download is complete."
    )
