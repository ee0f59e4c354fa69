"""What a worker does with one GGUF model of a zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlock.architectures.gguf_architectures import ACT
from fastlock.checkpoints.gguf import GgufModel, WithoutHeadsError, local_path, open_parts, receipt_of_parts
from fastlock.locks.lock import Lock
from fastlock.zoo.existing import why_not_this_relock


def why_gguf_is_skipped(source: str, geometries: Sequence[dict[str, Any]]) -> str | None:
    """Why a GGUF is none to relock: it has no heads, or is of none of these geometries; None where it is one.

    Raises:
        FastlockError, and its kinds: as for `fastlock.relock_gguf`.
    """
    path = local_path(source)
    try:
        model = GgufModel(open_parts(path), source)
    except WithoutHeadsError as error:
        return str(error)
    differences = [_difference(model, geometry) for geometry in geometries]
    return "; ".join(dict.fromkeys(differences)) if differences and all(differences) else None


def why_gguf_is_not_done(out: str, lock: Lock, strength: float) -> str | None:
    """What is wrong with a GGUF that is at `out` already; None if it is what would be made.

    Raises:
        FastlockError, and its kinds: it cannot be read.
    """
    found = receipt_of_parts(open_parts(local_path(out)), out)
    return why_not_this_relock(None if found is None else found.saved.receipt, lock, strength)


def _difference(model: GgufModel, base: dict[str, Any]) -> str:
    """How the geometry of a model differs from its base's; "" if it is the same."""
    family, numbers = base["model_type"], vars(model.geometry)
    if family not in ACT[model.architecture]:
        return f"architecture is {model.architecture}, to which no {family} is converted"
    return ", ".join(f"{key} is {value}, not {base[key]}" for key, value in numbers.items() if value != base[key])
