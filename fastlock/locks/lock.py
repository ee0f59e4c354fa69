"""The lock: K attention heads of an aligned base model, each with a unit direction and a scale."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastlock.errors import DamagedError, FastlockError, is_unicode
from fastlock.locks import lock_file, safelock
from fastlock.locks.lock_file import GEOMETRY, OPTIONAL, PROVENANCE, TENSORS
from fastlock.storage.files import read_bounded, write_atomic
from fastlock.storage.places import as_path
from fastlock.version import __version__

MAX_HEADS = 65_536
MAX_HEAD_DIM = 8_192
MAX_PROVENANCE_CHARACTERS = 16_384
# A unit vector rounded to float16, its norm too, is off by about 2**-10; the released locks are within 5e-4.
UNIT_TOLERANCE = 2e-3
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
        strength: the strength that calibration chose, applied where none is given; None without calibration.
        calibration: what was measured at that strength, as JSON; None without calibration.
        column_norms: Euclidean norm of each column that the base's output projection W_o has for a locked head,
            [K, head_dim] float32; None where the lock does not say. They decide nothing of the fold: they tell whether
            the heads of another checkpoint are still in the basis that the lock was found in.
        source: the file that the lock was loaded from, for messages.

    The tensors may be given as tensors of any device, arrays or lists; the lock keeps copies of its own, on the CPU.

    Raises:
        DamagedError: a row or a fact cannot be used, and comes from a file; docs/lock-format.md lists what is checked.
        FastlockError: the same, where the lock is made in memory.
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
    column_norms: torch.Tensor | None = None
    source: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, dtype in (TENSORS | OPTIONAL).items():
            if name in TENSORS or getattr(self, name) is not None:
                object.__setattr__(self, name, self._as_tensor(name, dtype))
        if self.directions.dim() == 2 and self.head_dim is None:
            object.__setattr__(self, "head_dim", self.directions.shape[1])
        if self.strength is not None:
            object.__setattr__(self, "strength", self._as_strength(self.strength))
        for check in _CHECKS:
            check(self)

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

        Provenance, geometry, column norms and the order of the rows do not change it.
        """
        sha = hashlib.sha256(f"{lock_file.FORMAT}\n{len(self)} {self.head_dim}\n".encode())
        for name in TENSORS:
            sha.update(self._ordered_bytes(name))
        return sha.hexdigest()

    def norms_by_layer(self) -> dict[int, torch.Tensor]:
        """The column norms of each locked layer's heads, heads ascending: [heads, head_dim] float32; empty without."""
        norms = self.column_norms
        return {} if norms is None else {layer: norms[rows] for layer, rows in self._rows_by_layer().items()}

    def displacement(self, strength: float) -> dict[int, Displacement]:
        """The displacement of each locked layer: `strength * scale * direction` at each locked head.

        This is the intervention of arXiv 2410.10343, α·σ·u, before the output projection.

        Args:
            strength: the paper's α: a finite number, 0 or more.

        Returns:
            layer -> `Displacement`, layers and heads ascending.

        Raises:
            FastlockError: the strength cannot be applied.
        """
        strength = check_strength(strength)
        values = strength * self.scales.double()[:, None] * self.directions.double()
        return {
            layer: Displacement(heads=tuple(self.heads[rows].tolist()), values=values[rows])
            for layer, rows in self._rows_by_layer().items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the lock as safetensors: the same lock gives the same bytes, everywhere and always.

        The file appears whole under its name or not at all.

        Raises:
            FastlockError: the name does not end in .safetensors, or the file cannot be written.
        """
        path = as_path(path)
        if path.suffix != ".safetensors":
            raise FastlockError(f"{path}: a fastlock lock is a safetensors file; name it {path.stem}.safetensors.")
        tensors = {name: getattr(self, name) for name in (TENSORS | OPTIONAL) if getattr(self, name) is not None}
        write_atomic(path, lock_file.serialized(tensors, self._metadata()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lock:
        """Read a lock: fastlock's own safetensors, or a released `.safelock` pickle (read, never executed).

        The content decides which of the two it is, not the name.

        Raises:
            DamagedError: the file is damaged or hostile, or a row cannot be used.
            UnsupportedError: it is a lock of a newer format.
            FastlockError: it is missing, too large, or not a lock.
        """
        path = as_path(path)
        data = read_bounded(path, lock_file.MAX_FILE_BYTES)
        if safelock.looks_like(data):
            return cls(**safelock.read(data, str(path)), recipe="safetylock", source=str(path))
        fields, digests = lock_file.read(data, str(path))
        lock = cls(**fields, source=str(path))
        found = lock._digests()
        for key, digest in digests.items():
            if digest != found.get(key):
                what = "rows do" if key == lock_file.DIGEST else f"{key.removesuffix('_digest')} do"
                raise DamagedError(f"{path}: its {what} not match its digest. The file is damaged: download it again.")
        return lock

    def _digests(self) -> dict[str, str]:
        """The digest of the rows, and one for each optional tensor, by their keys in the metadata."""
        own = {
            lock_file.digest_key(name): hashlib.sha256(self._ordered_bytes(name)).hexdigest()
            for name in OPTIONAL
            if getattr(self, name) is not None
        }
        return {lock_file.DIGEST: self.digest} | own

    def _ordered_bytes(self, name: str) -> bytes:
        """A tensor's rows, sorted by (layer, head), as digests take them."""
        # Not indexed by torch, which wakes its threads for these few numbers: on busy cores, for milliseconds.
        return lock_file.little_endian(torch.from_numpy(getattr(self, name).numpy()[self._order()]))

    def _metadata(self) -> dict[str, str]:
        """What the file says beside the tensors."""
        metadata = self._digests()
        facts = {name: getattr(self, name) for name in GEOMETRY + PROVENANCE}
        metadata |= {name: str(fact) for name, fact in facts.items() if fact is not None}
        metadata.setdefault("fastlock_version", __version__)
        if self.strength is not None:
            metadata["strength"] = repr(self.strength)
        return metadata

    def _rows_by_layer(self) -> dict[int, list[int]]:
        """The row numbers of each locked layer; layers, and heads within one, ascending."""
        rows_of_layer: dict[int, list[int]] = {}
        for row in self._order().tolist():
            rows_of_layer.setdefault(int(self.layers[row]), []).append(row)
        return rows_of_layer

    def _order(self) -> npt.NDArray[np.intp]:
        """Row numbers sorted by (layer, head)."""
        order: npt.NDArray[np.intp] = np.lexsort((self.heads.numpy(), self.layers.numpy()))
        return order

    def _as_tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """What was given for a tensor, as one of the lock's own."""
        value: Any = getattr(self, name)
        try:
            tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise _unusable(self, f"`{name}` is not a tensor of numbers ({error}).") from None
        if tensor.layout != torch.strided:
            raise _unusable(self, f"`{name}` is laid out as {tensor.layout}; give a dense tensor.")
        if tensor.is_complex() or (not dtype.is_floating_point and tensor.is_floating_point()):
            raise _unusable(self, f"`{name}` has dtype {tensor.dtype}; it must be {dtype}.")
        if not dtype.is_floating_point and tensor.numel() and not torch.equal(tensor.to(dtype).long(), tensor.long()):
            raise _unusable(self, f"`{name}` holds a number too large for an index. {_REMEDY}")
        return tensor.to(dtype).contiguous().clone()

    def _as_strength(self, strength: float | str) -> float:
        """The calibrated strength, which a file holds as a decimal."""
        try:
            if isinstance(strength, str) and not _DECIMAL.fullmatch(strength):
                raise ValueError(f"{strength[:40]!a} is not a decimal number.")
            return check_strength(float(strength) if isinstance(strength, str) else strength)
        except (FastlockError, ValueError) as error:
            raise _unusable(self, f"its calibrated strength cannot be used: {str(error)[:200]}") from None


def check_lock(lock: object) -> None:
    """Refuse what is not a `Lock`, such as the path of one.

    Raises:
        FastlockError: it is not.
    """
    if not isinstance(lock, Lock):
        raise FastlockError(f"lock is a {type(lock).__name__}; load it first: fastlock.Lock.load(path).")


def strength_for(lock: Lock, strength: float | None) -> float:
    """The strength to apply: the given one, else the lock's calibrated one, else the paper's 6.

    Raises:
        FastlockError: the given one cannot be applied.
    """
    if strength is not None:
        return check_strength(strength)
    return PAPER_STRENGTH if lock.strength is None else lock.strength


def check_strength(strength: float) -> float:
    """The strength as a float.

    Raises:
        FastlockError: it is not a finite number of 0 or more.
    """
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


def _unusable(lock: Lock, problem: str) -> FastlockError:
    """The error of a lock that cannot be used: a damaged file, or wrong arguments in memory."""
    if lock.source is None:
        return FastlockError(f"this lock: {problem}")
    return DamagedError(f"{lock.source}: {problem}")


_REMEDY = "The file is damaged or not a lock: download it again, or extract the lock again."


def _check_shapes(lock: Lock) -> None:
    if lock.layers.dim() != 1 or lock.layers.numel() == 0:
        raise _unusable(lock, f"`layers` has shape {list(lock.layers.shape)}; a lock has at least one row.")
    k = lock.layers.numel()
    if k > MAX_HEADS:
        raise _unusable(lock, f"{k} rows; a lock has at most {MAX_HEADS}.")
    if lock.heads.shape != (k,) or lock.scales.shape != (k,) or lock.directions.dim() != 2 or len(lock.directions) != k:
        shapes = ", ".join(f"{name} {list(getattr(lock, name).shape)}" for name in TENSORS)
        raise _unusable(
            lock,
            f"the tensors disagree on the number of rows ({shapes}); "
            "they must be [K], [K], [K, head_dim] and [K]. Save the lock again from its source.",
        )
    if not 0 < lock.directions.shape[1] <= MAX_HEAD_DIM:
        raise _unusable(
            lock, f"directions of {lock.directions.shape[1]} numbers; a head has from 1 to {MAX_HEAD_DIM}. {_REMEDY}"
        )
    if lock.head_dim != lock.directions.shape[1]:
        raise _unusable(
            lock,
            f"head_dim is given as {lock.head_dim}, but the directions have {lock.directions.shape[1]} "
            "numbers each. Save the lock again from its source.",
        )


def _check_geometry(lock: Lock) -> None:
    for name in GEOMETRY:
        value = getattr(lock, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31):
            raise _unusable(lock, f"{name} is {value!r}; it must be a positive integer.")


def _check_provenance(lock: Lock) -> None:
    for name in PROVENANCE:
        value = getattr(lock, name)
        if value is not None and not (isinstance(value, str) and is_unicode(value)):
            raise _unusable(lock, f"{name} is {str(value)[:80]!a}; it must be Unicode text.")
        if value is not None and len(value) > MAX_PROVENANCE_CHARACTERS:
            raise _unusable(lock, f"{name} is longer than {MAX_PROVENANCE_CHARACTERS} characters. Shorten it.")


def _check_numbers(lock: Lock) -> None:
    _refuse_rows(lock, (lock.layers < 0) | (lock.heads < 0), f"has a negative index. {_REMEDY}")
    not_finite = ~lock.directions.isfinite().all(dim=1)
    _refuse_rows(lock, not_finite, f"has a direction with NaN or infinite numbers. {_REMEDY}")
    _refuse_rows(lock, ~lock.scales.isfinite(), f"has a NaN or infinite scale. {_REMEDY}")
    _refuse_rows(lock, lock.scales <= 0, f"has a scale that is not positive. {_REMEDY}")
    off_unit = (lock.directions.double().norm(dim=1) - 1).abs() > UNIT_TOLERANCE
    remedy = "Divide it by its norm, and fold the norm into scale."
    _refuse_rows(lock, off_unit, f"has a direction that is not a unit vector. {remedy}")


def _check_column_norms(lock: Lock) -> None:
    if (norms := lock.column_norms) is None:
        return
    if norms.shape != lock.directions.shape:
        raise _unusable(
            lock,
            f"`column_norms` is {list(norms.shape)}, but must be [K, head_dim], as `directions` is: "
            f"{list(lock.directions.shape)}. Save the lock again from its source.",
        )
    bad = ~(norms.isfinite() & (norms >= 0)).all(dim=1)
    _refuse_rows(lock, bad, f"has a column norm that is negative, NaN or infinite. {_REMEDY}")


def _check_places(lock: Lock) -> None:
    """No head twice, and every head inside the base."""
    key = lock.layers.long() * 2**31 + lock.heads.long()
    order = torch.argsort(key, stable=True)
    repeated = torch.zeros_like(key, dtype=torch.bool)
    repeated[order[1:]] = key[order][1:] == key[order][:-1]
    _refuse_rows(lock, repeated, "appears twice. A head has one direction: remove one of the rows.")
    if lock.num_layers is not None:
        beyond = lock.layers >= lock.num_layers
        _refuse_rows(lock, beyond, f"is beyond the base's {lock.num_layers} layers. {_REMEDY}")
    if lock.num_heads is not None:
        beyond = lock.heads >= lock.num_heads
        _refuse_rows(lock, beyond, f"is beyond the base's {lock.num_heads} heads. {_REMEDY}")


def _refuse_rows(lock: Lock, bad: torch.Tensor, problem: str) -> None:
    """Refuse the first row for which `bad`, [K] bool, is true."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise _unusable(lock, f"row {row} (layer {int(lock.layers[row])}, head {int(lock.heads[row])}) {problem}")


# In this order: the later ones rely on the earlier ones.
_CHECKS = (_check_shapes, _check_geometry, _check_provenance, _check_numbers, _check_column_norms, _check_places)
