"""Whether the input of an output projection is still what it was in the model that the lock was found in.

Quantisers rotate or smooth activations and fold the inverse into the weights. The model stays the same, but a head's
output is no longer in the lock's basis, and a displacement would pull somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastlock.errors import UnsupportedError

# Keys by which llm-compressor and GPTQModel record that they rotated (QuaRot, SpinQuant), or transform at run time.
_ROTATED = ("transform_config", "transforms_config", "rotation", "online_rotation", "hadamard")
_MAX_DEPTH = 6


def check_basis(config: Mapping[str, Any], grouped: bool, where: str) -> None:
    """Refuse a checkpoint whose heads are not in the basis of the model that it was quantised from.

    Args:
        config: its `quantization_config`.
        grouped: whether several heads share a value head (grouped-query attention): AWQ then leaves them alone.
        where: the checkpoint, for messages.

    Raises:
        UnsupportedError: it says that it was rotated; or AWQ may have smoothed its heads, and does not say whether.
    """
    for key, value in _entries(config):
        if key in _ROTATED and value:
            raise UnsupportedError(
                f"{where}: its quantization_config says {key}: its heads were rotated, and a lock would pull somewhere "
                "else. Relock in memory before it is quantised, or quantise it without rotations."
            )
    if config.get("quant_method") == "awq" and not grouped:
        raise UnsupportedError(
            f"{where}: AWQ scales the heads of models without grouped-query attention, and does not write down by how "
            "much: a lock would pull somewhere else. Relock the unquantised checkpoint, then quantise it in another "
            "way."
        )


def _entries(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key of nested objects, with its value."""
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        for key, held in value.items():
            yield str(key), held
            yield from _entries(held, depth + 1)
    elif depth < _MAX_DEPTH and isinstance(value, list):
        for held in value:
            yield from _entries(held, depth + 1)
