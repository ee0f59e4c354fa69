"""The lock: K attention heads of an aligned base model, each with a unit direction and a scale.

The file format is specified in docs/lock-format.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastlock.errors import FastlockError
from fastlock.locks import safelock
from fastlock.storage.files import no_duplicates, read_bounded, write_atomic
from fastlock.storage.places import as_path
from fastlock.version import __version__

FORMAT = "fastlock-lock"
FORMAT_VERSION = "1"
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
MAX_HEADS = 65_536
MAX_HEAD_DIM = 8_192
MAX_PROVENANCE_CHARACTERS = 16_384
# A unit vector rounded to float16, its norm too, is off by about 2**-10; the released locks are within 5e-4.
UNIT_TOLERANCE = 2e-3

_TENSORS = {"layers": torch.int32, "heads": torch.int32, "directions": torch.float32, "scales": torch.float32}
# The tensors as a file holds them: in the order in which the safetensors library lays them out.
_STORED = {"directions": "F32", "scales": "F32", "heads": "I32", "layers": "I32"}
_GEOMETRY = ("num_layers", "num_heads", "head_dim", "hidden_size")
_PROVENANCE = ("base_model", "recipe", "extraction_digest", "fastlock_version", "calibration")
# The paper's α, for locks that were not calibrated.
PAPER_STRENGTH = 6.0
# Python's `float` also reads "1_0", " 6 " and the digits of other scripts.
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Displacement:
    """The sparse shift of one layer's concatenated head outputs, zero off the locked heads.

    Attributes:
        heads: the locked heads of this layer, ascending.
        values: `strength * scale * direction` of each, [len(heads), head_dim] float64 on the CPU.
    """

    heads: tuple[int, ...]
    values: torch.Tensor

    @property
    def head_dim(self) -> int:
        """How many numbers a head has."""
        return self.values.shape[1]

    def dense(self, width: int) -> torch.Tensor:
        """The displacement d as a whole vector: [width] float64, `width = num_heads * head_dim`."""
        d = torch.zeros(width, dtype=torch.float64, device="cpu")
        for head, value in zip(self.heads, self.values, strict=True):
            d[head * self.head_dim : (head + 1) * self.head_dim] = value
        return d


@dataclass(frozen=True, eq=False)
class Lock:
    """A safety lock (the Meta-SafetyLock of arXiv 2410.10343), extracted once from an aligned base.

    Attributes:
        layers: layer of each row, [K] int32.
        heads: attention head of each row, [K] int32.
        directions: unit direction in that head's output space, [K, head_dim] float32.
        scales: standard deviation of the extraction activations along it, [K] float32, positive.
        num_layers, num_heads, head_dim, hidden_size: the base's geometry. `head_dim` is always known;
            the others are None for a lock whose file did not record them.
        base_model, recipe, extraction_digest, fastlock_version: where the lock comes from, None where unknown.
        strength: the strength that calibration chose, which is applied where none is given; None where there was none.
        calibration: what it measured there, as JSON.
        source: the file it was loaded from, for messages.

    Raises:
        FastlockError: a row or a fact can't be used: docs/lock-format.md lists what is checked.
    """

    layers: torch.Tensor
    heads: torch.Tensor
    directions: torch.Tensor
    scales: torch.Tensor
    num_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    hidden_size: int | None = None
    base_model: str | None = None
    recipe: str | None = None
    extraction_digest: str | None = None
    fastlock_version: str | None = None
    strength: float | None = None
    calibration: str | None = None
    source: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        where = self.source or "this lock"
        for name, dtype in _TENSORS.items():
            object.__setattr__(self, name, _as_tensor(getattr(self, name), dtype, name, where))
        if self.directions.dim() == 2 and self.head_dim is None:
            object.__setattr__(self, "head_dim", self.directions.shape[1])
        if self.strength is not None:
            object.__setattr__(self, "strength", _as_strength(self.strength, where))
        _check(self, where)

    def __len__(self) -> int:
        return self.layers.numel()

    def __repr__(self) -> str:
        base = f" of {self.base_model}" if self.base_model else ""
        return (
            f"Lock({len(self)} heads in {len(set(self.layers.tolist()))} layers{base}, "
            f"head_dim {self.head_dim}, sha256 {self.digest[:12]})"
        )

    def __eq__(self, other: object) -> bool:
        """Equal when they fold to the same biases: the same rows, in whatever order."""
        return self.digest == other.digest if isinstance(other, Lock) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides the fold: the rows, sorted by (layer, head), and head_dim; nothing else.

        Provenance, geometry and the order of the rows do not change it.
        """
        order = self._order()
        sha = hashlib.sha256(f"{FORMAT}\n{len(self)} {self.head_dim}\n".encode())
        for name in _TENSORS:
            sha.update(_little_endian(getattr(self, name)[order]))
        return sha.hexdigest()

    def displacement(self, strength: float) -> dict[int, Displacement]:
        """The displacement of each locked layer, `strength * scale * direction` (the paper's α·σ·u).

        Args:
            strength: the paper's α: a finite number, 0 or more.

        Returns:
            layer -> `Displacement`, layers and heads ascending.
        """
        strength = check_strength(strength)
        rows = strength * self.scales.double()[:, None] * self.directions.double()
        by_layer: dict[int, list[int]] = {}
        for row in self._order().tolist():
            by_layer.setdefault(int(self.layers[row]), []).append(row)
        return {
            layer: Displacement(heads=tuple(self.heads[of_layer].tolist()), values=rows[of_layer])
            for layer, of_layer in by_layer.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the lock as safetensors: the same lock gives the same bytes, everywhere and always.

        The file appears whole under its name or not at all.
        """
        path = as_path(path)
        if path.suffix != ".safetensors":
            raise FastlockError(f"{path}: a fastlock lock is a safetensors file; name it {path.stem}.safetensors.")
        write_atomic(path, _serialize(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lock:
        """Read a lock: fastlock's own safetensors, or a released `.safelock` pickle (read, never executed).

        The format is told by the content, not by the name.

        Raises:
            FastlockError: the file is missing, too large, no lock, or holds a row that can't be used.
        """
        path = as_path(path)
        data = read_bounded(path, MAX_FILE_BYTES)
        if safelock.looks_like(data):
            return cls(**safelock.read(data, str(path)), recipe="safetylock", source=str(path))
        return _deserialize(data, str(path))

    def _order(self) -> torch.Tensor:
        """Row numbers sorted by (layer, head)."""
        return torch.argsort(self.layers.long() * (int(self.heads.max()) + 1) + self.heads.long())


def check_lock(lock: object) -> None:
    """That what a user gave as a lock is one, rather than the path of one."""
    if not isinstance(lock, Lock):
        raise FastlockError(f"lock is a {type(lock).__name__}; load it first: fastlock.Lock.load(path).")


def strength_for(lock: Lock, strength: float | None) -> float:
    """The strength to apply: the one that is given; else the one that the lock was calibrated at; else the paper's."""
    if strength is not None:
        return check_strength(strength)
    return PAPER_STRENGTH if lock.strength is None else lock.strength


def check_strength(strength: float) -> float:
    """The strength as a float, if it is one that fastlock applies."""
    try:
        if isinstance(strength, (str, bytes, bool)):
            raise TypeError
        value = float(strength)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise FastlockError(f"strength is {strength!r}; it must be a number, 0 or more (the paper's α is 6).") from None
    if not math.isfinite(value):
        raise FastlockError(f"strength is {value}; it must be a finite number, 0 or more (the paper's α is 6).")
    if value < 0:
        raise FastlockError(
            f"strength is {value}: a negative strength would push the model away from its refusals, beyond its own "
            "baseline. fastlock exists to restore them and does not do that; use 0 or more, or fastlock.unlock."
        )
    return value


def _as_strength(strength: float | str, where: str) -> float:
    """The calibrated strength, of which a file holds the decimal."""
    try:
        if isinstance(strength, str) and not _DECIMAL.fullmatch(strength):
            raise ValueError(f"{strength[:40]!a} is no decimal number.")
        return check_strength(float(strength) if isinstance(strength, str) else strength)
    except (FastlockError, ValueError) as error:
        raise FastlockError(f"{where}: its calibrated strength can't be used: {str(error)[:200]}") from None


def _as_tensor(value: Any, dtype: torch.dtype, name: str, where: str) -> torch.Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FastlockError(f"{where}: `{name}` is not a tensor of numbers ({error}).") from None
    if tensor.layout != torch.strided:
        raise FastlockError(f"{where}: `{name}` is laid out as {tensor.layout}; give a dense tensor.")
    if tensor.is_complex() or (not dtype.is_floating_point and tensor.is_floating_point()):
        raise FastlockError(f"{where}: `{name}` has dtype {tensor.dtype}; it must be {dtype}.")
    if not dtype.is_floating_point and tensor.numel() and not torch.equal(tensor.to(dtype).long(), tensor.long()):
        raise FastlockError(f"{where}: `{name}` holds a number too large for an index; the file is damaged.")
    return tensor.to(dtype).contiguous().clone()


def _check(lock: Lock, where: str) -> None:
    """Every row can be used: shapes agree, numbers are finite, directions unit, scales positive, no head twice."""
    if lock.layers.dim() != 1 or lock.layers.numel() == 0:
        raise FastlockError(f"{where}: `layers` has shape {list(lock.layers.shape)}; a lock has at least one row.")
    k = lock.layers.numel()
    if k > MAX_HEADS:
        raise FastlockError(f"{where}: {k} rows; a lock has at most {MAX_HEADS}.")
    if lock.heads.shape != (k,) or lock.scales.shape != (k,) or lock.directions.dim() != 2 or len(lock.directions) != k:
        shapes = ", ".join(f"{name} {list(getattr(lock, name).shape)}" for name in _TENSORS)
        raise FastlockError(
            f"{where}: the tensors disagree on the number of rows ({shapes}); "
            "they must be [K], [K], [K, head_dim] and [K]. Save the lock again from its source."
        )
    if not 0 < lock.directions.shape[1] <= MAX_HEAD_DIM:
        raise FastlockError(f"{where}: directions of {lock.directions.shape[1]} numbers are no head's output.")
    if lock.head_dim != lock.directions.shape[1]:
        raise FastlockError(
            f"{where}: head_dim is given as {lock.head_dim}, but the directions have {lock.directions.shape[1]} "
            "numbers each. Save the lock again from its source."
        )
    _check_geometry(lock, where)
    _check_provenance(lock, where)
    _check_rows(lock, where)


def _check_geometry(lock: Lock, where: str) -> None:
    for name in _GEOMETRY:
        value = getattr(lock, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31):
            raise FastlockError(f"{where}: {name} is {value!r}; it must be a positive whole number.")


def _check_provenance(lock: Lock, where: str) -> None:
    for name in _PROVENANCE:
        value = getattr(lock, name)
        if value is not None and not (isinstance(value, str) and _is_unicode(value)):
            raise FastlockError(f"{where}: {name} is {str(value)[:80]!a}; it must be Unicode text.")
        if value is not None and len(value) > MAX_PROVENANCE_CHARACTERS:
            raise FastlockError(f"{where}: {name} is longer than {MAX_PROVENANCE_CHARACTERS} characters. Shorten it.")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_rows(lock: Lock, where: str) -> None:
    def refuse(bad: torch.Tensor, problem: str) -> None:
        if bad.any():
            row = int(bad.nonzero()[0])
            raise FastlockError(
                f"{where}: row {row} (layer {int(lock.layers[row])}, head {int(lock.heads[row])}) {problem}"
            )

    remedy = "The file is damaged or not a lock: get it again, or extract the lock anew."
    refuse((lock.layers < 0) | (lock.heads < 0), f"has a negative index. {remedy}")
    refuse(~lock.directions.isfinite().all(dim=1), f"has a direction with NaN or infinite numbers. {remedy}")
    refuse(~lock.scales.isfinite(), f"has a NaN or infinite scale. {remedy}")
    refuse(lock.scales <= 0, f"has a scale that is not positive. {remedy}")
    off_unit = (lock.directions.double().norm(dim=1) - 1).abs() > UNIT_TOLERANCE
    refuse(off_unit, "has a direction that is not a unit vector. Divide it by its norm, and fold the norm into scale.")
    key = lock.layers.long() * 2**31 + lock.heads.long()
    order = torch.argsort(key, stable=True)
    again = torch.zeros_like(key, dtype=torch.bool)
    again[order[1:]] = key[order][1:] == key[order][:-1]
    refuse(again, "appears twice. A head has one direction: remove one of the rows.")
    if lock.num_layers is not None:
        refuse(lock.layers >= lock.num_layers, f"is beyond the base's {lock.num_layers} layers. {remedy}")
    if lock.num_heads is not None:
        refuse(lock.heads >= lock.num_heads, f"is beyond the base's {lock.num_heads} heads. {remedy}")


def _little_endian(tensor: torch.Tensor) -> bytes:
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _serialize(lock: Lock) -> bytes:
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "lock_digest": lock.digest}
    metadata |= {name: str(getattr(lock, name)) for name in _GEOMETRY + _PROVENANCE if getattr(lock, name) is not None}
    metadata.setdefault("fastlock_version", __version__)
    if lock.strength is not None:
        metadata["strength"] = repr(lock.strength)
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, dtype in _STORED.items():
        tensor = getattr(lock, name)
        offset = len(body)
        body += _little_endian(tensor)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, len(body)]}
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + body


def _deserialize(data: bytes, where: str) -> Lock:
    header = _header(data, where)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FastlockError(
            f"{where}: a safetensors file, but not a lock (its metadata lacks format={FORMAT!r}). "
            "Give the lock file, not a checkpoint."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        version = str(metadata.get("format_version"))[:40]
        raise FastlockError(
            f"{where}: lock format version {version!r}; this fastlock reads {FORMAT_VERSION!r}. Upgrade fastlock."
        )
    if header.keys() != _TENSORS.keys():
        found = ", ".join(sorted(header))[:200] or "nothing"
        raise FastlockError(
            f"{where}: a lock holds {', '.join(_TENSORS)}; found {found}. The file is damaged: get it again."
        )
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _not_a_lock(where, error) from None
    for name, dtype in _TENSORS.items():
        if tensors[name].dtype != dtype:
            raise FastlockError(
                f"{where}: `{name}` should be {dtype}, found {tensors[name].dtype}. The file is damaged: get it again."
            )
    fields: dict[str, Any] = tensors | {name: metadata[name] for name in _PROVENANCE if name in metadata}
    fields |= {name: _whole_number(metadata[name], name, where) for name in _GEOMETRY if name in metadata}
    lock = Lock(**fields, strength=metadata.get("strength"), source=where)
    if metadata.get("lock_digest") not in (None, lock.digest):
        raise FastlockError(f"{where}: its rows do not match its digest. The file is damaged: get it again.")
    return lock


def _header(data: bytes, where: str) -> dict[str, Any]:
    """The file's JSON header, before the library makes a tensor of everything that it declares."""
    try:
        size = int.from_bytes(data[:8], "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes, where a lock has at most {MAX_HEADER_BYTES}")
        header = json.loads(data[8 : 8 + size], object_pairs_hook=no_duplicates)
        if not isinstance(header, dict):
            raise TypeError("its header is no JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise _not_a_lock(where, error) from None
    return header


def _not_a_lock(where: str, error: Exception) -> FastlockError:
    return FastlockError(
        f"{where}: neither a fastlock lock (safetensors) nor a released .safelock file ({str(error)[:200]}). "
        "Check that the download is complete."
    )


def _whole_number(text: str, name: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise FastlockError(f"{where}: metadata `{name}` is {text[:40]!r}; it must be a whole number.")
    return int(text)
