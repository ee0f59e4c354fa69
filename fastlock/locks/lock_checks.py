"""What is checked of a lock's numbers and facts before it is used: docs/lock-format.md lists it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastlock.errors import DamagedError, FastlockError, is_unicode
from fastlock.locks.gate import MAX_RANK
from fastlock.locks.lock_file import GEOMETRY, PROVENANCE, TENSORS

if TYPE_CHECKING:
    from fastlock.locks.lock import Lock

MAX_HEADS = 65_536
MAX_HEAD_DIM = 8_192
MAX_PROVENANCE_CHARACTERS = 16_384
# A unit vector rounded to float16, its norm too, is off by about 2**-10; the released locks are within 5e-4.
UNIT_TOLERANCE = 2e-3
REMEDY = "The file is damaged or not a lock: download it again, or extract the lock again."


def unusable(lock: Lock, problem: str) -> FastlockError:
    """The error of a lock that cannot be used: a damaged file, or wrong arguments in memory."""
    if lock.source is None:
        return FastlockError(f"this lock: {problem}")
    return DamagedError(f"{lock.source}: {problem}")


def _check_shapes(lock: Lock) -> None:
    if lock.layers.dim() != 1 or lock.layers.numel() == 0:
        raise unusable(lock, f"`layers` has shape {list(lock.layers.shape)}; a lock has at least one row.")
    k = lock.layers.numel()
    if k > MAX_HEADS:
        raise unusable(lock, f"{k} rows; a lock has at most {MAX_HEADS}.")
    if lock.heads.shape != (k,) or lock.scales.shape != (k,) or lock.directions.dim() != 2 or len(lock.directions) != k:
        shapes = ", ".join(f"{name} {list(getattr(lock, name).shape)}" for name in TENSORS)
        raise unusable(
            lock,
            f"the tensors disagree on the number of rows ({shapes}); "
            "they must be [K], [K], [K, head_dim] and [K]. Save the lock again from its source.",
        )
    if not 0 < lock.directions.shape[1] <= MAX_HEAD_DIM:
        raise unusable(
            lock, f"directions of {lock.directions.shape[1]} numbers; a head has from 1 to {MAX_HEAD_DIM}. {REMEDY}"
        )
    if lock.head_dim != lock.directions.shape[1]:
        raise unusable(
            lock,
            f"head_dim is given as {lock.head_dim}, but the directions have {lock.directions.shape[1]} "
            "numbers each. Save the lock again from its source.",
        )


def _check_geometry(lock: Lock) -> None:
    for name in GEOMETRY:
        value = getattr(lock, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31):
            raise unusable(lock, f"{name} is {value!r}; it must be a positive integer.")


def _check_provenance(lock: Lock) -> None:
    for name in PROVENANCE:
        value = getattr(lock, name)
        if value is not None and not (isinstance(value, str) and is_unicode(value)):
            raise unusable(lock, f"{name} is {str(value)[:80]!a}; it must be Unicode text.")
        if value is not None and len(value) > MAX_PROVENANCE_CHARACTERS:
            raise unusable(lock, f"{name} is longer than {MAX_PROVENANCE_CHARACTERS} characters. Shorten it.")


def _check_numbers(lock: Lock) -> None:
    _refuse_rows(lock, (lock.layers < 0) | (lock.heads < 0), f"has a negative index. {REMEDY}")
    not_finite = ~lock.directions.isfinite().all(dim=1)
    _refuse_rows(lock, not_finite, f"has a direction with NaN or infinite numbers. {REMEDY}")
    _refuse_rows(lock, ~lock.scales.isfinite(), f"has a NaN or infinite scale. {REMEDY}")
    without = _rows_without_constant(lock)
    _refuse_rows(lock, (lock.scales <= 0) & ~without, f"has a scale that is not positive. {REMEDY}")
    off_unit = ((lock.directions.double().norm(dim=1) - 1).abs() > UNIT_TOLERANCE) & ~without
    remedy = "Divide it by its norm, and fold the norm into scale."
    _refuse_rows(lock, off_unit, f"has a direction that is not a unit vector. {remedy}")


def _rows_without_constant(lock: Lock) -> torch.Tensor:
    """Which rows have a gate alone, [K] bool: their scale is 0, and their direction all zeros."""
    if not lock.rank:
        return torch.zeros_like(lock.scales, dtype=torch.bool)
    return (lock.scales == 0) & (lock.directions == 0).all(dim=1)


def _check_gate(lock: Lock) -> None:
    readers, writers = lock.readers, lock.writers
    if readers is None and writers is None:
        return
    if readers is None or writers is None:
        there, missing = ("writers", "readers") if readers is None else ("readers", "writers")
        raise unusable(lock, f"it has `{there}`, but no `{missing}`; a gate has both. Save the lock again.")
    k, head_dim = lock.directions.shape
    if readers.dim() != 3 or readers.shape != writers.shape or readers.shape[::2] != (k, head_dim):
        raise unusable(
            lock,
            f"`readers` is {list(readers.shape)} and `writers` {list(writers.shape)}; both must be "
            f"[K, rank, head_dim], here [{k}, rank, {head_dim}]. Save the lock again from its source.",
        )
    if not 0 < readers.shape[1] <= MAX_RANK:
        raise unusable(lock, f"a gate of rank {readers.shape[1]}; it must be from 1 to {MAX_RANK}. {REMEDY}")
    for name, rows in (("reader", readers), ("writer", writers)):
        bad = ~rows.isfinite().flatten(1).all(dim=1)
        _refuse_rows(lock, bad, f"has a {name} with NaN or infinite numbers. {REMEDY}")


def _check_column_norms(lock: Lock) -> None:
    if (norms := lock.column_norms) is None:
        return
    if norms.shape != lock.directions.shape:
        raise unusable(
            lock,
            f"`column_norms` is {list(norms.shape)}, but must be [K, head_dim], as `directions` is: "
            f"{list(lock.directions.shape)}. Save the lock again from its source.",
        )
    bad = ~(norms.isfinite() & (norms >= 0)).all(dim=1)
    _refuse_rows(lock, bad, f"has a column norm that is negative, NaN or infinite. {REMEDY}")


def _check_places(lock: Lock) -> None:
    """No head twice, and every head inside the base."""
    key = lock.layers.long() * 2**31 + lock.heads.long()
    order = torch.argsort(key, stable=True)
    repeated = torch.zeros_like(key, dtype=torch.bool)
    repeated[order[1:]] = key[order][1:] == key[order][:-1]
    _refuse_rows(lock, repeated, "appears twice. A head has one direction: remove one of the rows.")
    if lock.num_layers is not None:
        beyond = lock.layers >= lock.num_layers
        _refuse_rows(lock, beyond, f"is beyond the base's {lock.num_layers} layers. {REMEDY}")
    if lock.num_heads is not None:
        beyond = lock.heads >= lock.num_heads
        _refuse_rows(lock, beyond, f"is beyond the base's {lock.num_heads} heads. {REMEDY}")


def _refuse_rows(lock: Lock, bad: torch.Tensor, problem: str) -> None:
    """Refuse the first row for which `bad`, [K] bool, is true."""
    if bad.any():
        row = int(bad.nonzero()[0])
        raise unusable(lock, f"row {row} (layer {int(lock.layers[row])}, head {int(lock.heads[row])}) {problem}")


# In this order: the later ones rely on the earlier ones.
CHECKS = (
    _check_shapes,
    _check_geometry,
    _check_provenance,
    _check_gate,
    _check_numbers,
    _check_column_norms,
    _check_places,
)
