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
FORMAT_VERSION = "1"
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024

# The tensors, in the order in which the digest takes them.
TENSORS = {"layers": torch.int32, "heads": torch.int32, "directions": torch.float32, "scales": torch.float32}
# The metadata about the base, and about where the lock comes from.
GEOMETRY = ("num_layers", "num_heads", "head_dim", "hidden_size")
PROVENANCE = ("base_model", "recipe", "extraction_digest", "fastlock_version", "calibration")

# The tensors as a file holds them: in the order in which the safetensors library lays them out.
_STORED = {"directions": "F32", "scales": "F32", "heads": "I32", "layers": "I32"}


def little_endian(tensor: torch.Tensor) -> bytes:
    """The numbers of a CPU tensor, row by row, as files and digests take them on every machine."""
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def serialized(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a lock's file: the same tensors and metadata give the same bytes, everywhere and always.

    Args:
        tensors: by name, those of `TENSORS`, on the CPU.
        metadata: without the format and its version.
    """
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "format_version": FORMAT_VERSION, **metadata}}
    body = b""
    for name, dtype in _STORED.items():
        offset = len(body)
        body += little_endian(tensors[name])
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, len(body)]}
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + body


def read(data: bytes, where: str) -> tuple[dict[str, Any], str | None]:
    """The fields of the `Lock` in a file, and the digest that the file says its rows have.

    Args:
        data: the file's bytes.
        where: the file's name, for messages.

    Returns:
        The four tensors of `TENSORS`, and what there is of geometry (int), provenance (str) and strength (the text
        of a decimal), by the names of `Lock`'s fields; the digest in hex, None where the file has none.

    Raises:
        UnsupportedError: the file is of a newer format.
        DamagedError: it is damaged.
        FastlockError: it is safetensors, but not a lock.
    """
    header = _header(data, where)
    metadata = header.pop("__metadata__", None)
    _check_format(metadata, where)
    if header.keys() != TENSORS.keys():
        names = ", ".join(sorted(header))[:200] or "nothing"
        raise DamagedError(
            f"{where}: a lock holds {', '.join(TENSORS)}; this file holds {names}. It is damaged: download it again."
        )
    fields: dict[str, Any] = _tensors(data, where)
    fields |= {name: metadata[name] for name in (*PROVENANCE, "strength") if name in metadata}
    fields |= {name: _integer(metadata[name], name, where) for name in GEOMETRY if name in metadata}
    return fields, metadata.get("lock_digest")


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


def _check_format(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FastlockError(
            f"{where}: a safetensors file, but not a lock (its metadata lacks format={FORMAT!r}). "
            "Give the lock file, not a checkpoint."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        version = str(metadata.get("format_version"))[:40]
        raise UnsupportedError(
            f"{where}: lock format version {version!r}; this fastlock reads {FORMAT_VERSION!r}. Upgrade fastlock."
        )


def _tensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _unreadable(where, error) from None
    for name, dtype in TENSORS.items():
        if tensors[name].dtype != dtype:
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
