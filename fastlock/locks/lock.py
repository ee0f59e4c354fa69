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

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.locks import lock_file, safelock
from fastlock.locks.gate import Gate
from fastlock.locks.lock_checks import CHECKS, REMEDY, unusable
from fastlock.locks.lock_file import GATE, GEOMETRY, OPTIONAL, PROVENANCE, TENSORS
from fastlock.storage.files import read_bounded, write_atomic
from fastlock.storage.places import as_path
from fastlock.version import __version__

# The paper's α, for locks that were not calibrated, and what a gate is trained at.
PAPER_STRENGTH, GATE_STRENGTH = 6.0, 1.0
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
    """A safety lock (the Meta-SafetyLock of arXiv 2410.10343), made once on an aligned base.

    It has a constant part, which shifts what the locked heads say whatever is asked (`directions` and `scales`), or a
    gate, which answers to what they say (`readers` and `writers`), or both.

    Attributes:
        layers: layer of each row, [K] int32.
        heads: attention head of each row, [K] int32.
        directions: unit direction in that head's output space, [K, head_dim] float32.
        scales: standard deviation of the extraction activations along it, [K] float32, positive. A lock with a gate may
            have rows without a constant part: their scale is 0, and their direction all zeros.
        num_layers, num_heads, head_dim, hidden_size: the base's geometry. `head_dim` is always known;
            the others are None for a lock whose file did not record them.
        base_model, recipe, extraction_digest, fastlock_version: where the lock comes from, None where unknown.
        strength: the strength that calibration chose, applied where none is given; None without calibration.
        calibration: what was measured at that strength, as JSON; None without calibration.
        readers, writers: V and U of the gate x ← x + s·U Vᵀ x at the input of a locked layer's output projection, over
            its locked heads: [K, rank, head_dim] float32, a head's part in its row; both None for a lock without one.
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
    readers: torch.Tensor | None = None
    writers: torch.Tensor | None = None
    column_norms: torch.Tensor | None = None
    source: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, dtype in (TENSORS | GATE | OPTIONAL).items():
            if name in TENSORS or getattr(self, name) is not None:
                object.__setattr__(self, name, self._as_tensor(name, dtype))
        if self.directions.dim() == 2 and self.head_dim is None:
            object.__setattr__(self, "head_dim", self.directions.shape[1])
        if self.strength is not None:
            object.__setattr__(self, "strength", self._as_strength(self.strength))
        for check in CHECKS:
            check(self)

    def __len__(self) -> int:
        return self.layers.numel()

    def __repr__(self) -> str:
        base = f" of {self.base_model}" if self.base_model else ""
        gate = f", gate of rank {self.rank}" if self.rank else ""
        return (
            f"Lock({len(self)} heads in {len(set(self.layers.tolist()))} layers{base}{gate}, "
            f"head_dim {self.head_dim}, sha256 {self.digest[:12]})"
        )

    def __eq__(self, other: object) -> bool:
        """Equal when they fold to the same biases: the same rows, in whatever order."""
        return self.digest == other.digest if isinstance(other, Lock) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what decides the fold: the rows, sorted by (layer, head), and their sizes; nothing else.

        Provenance, geometry, column norms and the order of the rows do not change it.
        """
        sizes = f"{len(self)} {self.head_dim}{f' {self.rank}' if self.rank else ''}"
        sha = hashlib.sha256(f"{lock_file.FORMAT}\n{sizes}\n".encode())
        for name in (*TENSORS, *(GATE if self.rank else ())):
            sha.update(self._ordered_bytes(name))
        return sha.hexdigest()

    @property
    def rank(self) -> int:
        """The rank of the gate in each layer, 0 for a lock without one."""
        return 0 if self.readers is None else self.readers.shape[1]

    @property
    def has_constant(self) -> bool:
        """Whether it has a constant part, which takes a bias; a gate alone takes none."""
        return bool(self.scales.any())

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
            UnsupportedError: it has a gate, too, which must not be lost: whoever folds that takes `constant` and
                `gates`.
            FastlockError: the strength cannot be applied.
        """
        if self.rank:
            raise UnsupportedError(
                f"{self!r} has a gate, which goes into weights, and only a bias can be changed here. Relock the "
                "checkpoint itself with it, or use a lock without a gate."
            )
        return self.constant(strength)

    def constant(self, strength: float) -> dict[int, Displacement]:
        """As `displacement`, of a lock that may have a gate besides: its constant part, zeros where it has none.

        Raises:
            FastlockError: the strength cannot be applied.
        """
        strength = check_strength(strength)
        values = strength * self.scales.double()[:, None] * self.directions.double()
        return {
            layer: Displacement(heads=tuple(self.heads[rows].tolist()), values=values[rows])
            for layer, rows in self._rows_by_layer().items()
        }

    def gates(self, strength: float) -> dict[int, Gate]:
        """The gate of each locked layer, its writers times the strength; empty for a lock without one.

        Args:
            strength: a finite number, 0 or more, the same as for the constant part.

        Returns:
            layer -> `Gate`, layers and heads ascending.

        Raises:
            FastlockError: the strength cannot be applied.
        """
        strength = check_strength(strength)
        if self.readers is None or self.writers is None:
            return {}
        readers, writers = (rows.double().transpose(0, 1) for rows in (self.readers, self.writers))
        return {
            layer: Gate(tuple(self.heads[rows].tolist()), readers[:, rows], strength * writers[:, rows])
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
        names = TENSORS | GATE | OPTIONAL
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
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
            raise unusable(self, f"`{name}` is not a tensor of numbers ({error}).") from None
        if tensor.layout != torch.strided:
            raise unusable(self, f"`{name}` is laid out as {tensor.layout}; give a dense tensor.")
        if tensor.is_complex() or (not dtype.is_floating_point and tensor.is_floating_point()):
            raise unusable(self, f"`{name}` has dtype {tensor.dtype}; it must be {dtype}.")
        if not dtype.is_floating_point and tensor.numel() and not torch.equal(tensor.to(dtype).long(), tensor.long()):
            raise unusable(self, f"`{name}` holds a number too large for an index. {REMEDY}")
        return tensor.to(dtype).contiguous().clone()

    def _as_strength(self, strength: float | str) -> float:
        """The calibrated strength, which a file holds as a decimal."""
        try:
            if isinstance(strength, str) and not _DECIMAL.fullmatch(strength):
                raise ValueError(f"{strength[:40]!a} is not a decimal number.")
            return check_strength(float(strength) if isinstance(strength, str) else strength)
        except (FastlockError, ValueError) as error:
            raise unusable(self, f"its calibrated strength cannot be used: {str(error)[:200]}") from None


def check_lock(lock: object) -> None:
    """Refuse what is not a `Lock`, such as the path of one.

    Raises:
        FastlockError: it is not.
    """
    if not isinstance(lock, Lock):
        raise FastlockError(f"lock is a {type(lock).__name__}; load it first: fastlock.Lock.load(path).")


def strength_for(lock: Lock, strength: float | None) -> float:
    """The strength to apply: the given one, else the lock's calibrated one, else the paper's 6 (with a gate: 1).

    Raises:
        FastlockError: the given one cannot be applied.
    """
    if strength is not None:
        return check_strength(strength)
    if lock.strength is not None:
        return lock.strength
    return GATE_STRENGTH if lock.rank else PAPER_STRENGTH


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
