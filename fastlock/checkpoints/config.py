"""The config.json of a stranger's checkpoint, read safely: it runs no code, and no number in it fills the memory."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from fastlock.architectures.families import FAMILIES, REFUSED, head_geometry, refused_family
from fastlock.checkpoints.plain_config import plain_config
from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.storage.files import (
    CONFIG,
    DOWNLOAD_AGAIN,
    MAX_CONFIG_DEPTH,
    File,
    holds_no_config,
    parse_object,
    read_all,
)

# Relocked, a config holds the biases that its checkpoint had before: some megabytes in the largest models.
MAX_CONFIG_BYTES = 16 * 1024 * 1024
MAX_LAYERS = 10_000
MAX_SIZE = 2**20

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def read_config(files: Mapping[str, File], where: str) -> dict[str, Any]:
    """The parsed config.json.

    Raises:
        DamagedError: it is not a JSON object.
        UnsupportedError: there are GGUF files, or an adapter, instead.
        FastlockError: there is none.
    """
    if CONFIG not in files:
        raise holds_another_kind(files, where) or holds_no_config(where)
    place = f"{where}/{CONFIG}"
    return parse_object(read_all(files[CONFIG], place, MAX_CONFIG_BYTES), place, depth=MAX_CONFIG_DEPTH)


def holds_another_kind(files: Collection[str], where: str) -> UnsupportedError | None:
    """The error that says what is in a directory instead of a checkpoint; None where nothing is that fastlock knows."""
    if any(name.lower().endswith(".gguf") for name in files):
        return UnsupportedError(
            f"{where}: holds GGUF. Give the path of the GGUF file itself (in Python, fastlock.relock_gguf), or all of "
            "them to fastlock zoo; or relock the safetensors that it was made from, and convert the result."
        )
    if "adapter_config.json" in files:
        return UnsupportedError(
            f"{where}: holds an adapter, and no model. Give the base that it is served over, too: fastlock relock "
            "ADAPTER --base BASE (in Python, fastlock.relock_adapter)."
        )
    return None


def transformers_config(raw: dict[str, Any], where: str) -> Any:
    """What transformers makes of a config.json, of known families only, and never running the checkpoint's own code.

    Args:
        raw: the parsed config.json.
        where: the checkpoint, for messages.

    Raises:
        UnsupportedError: its family is refused, or neither fastlock nor transformers knows it.
        DamagedError: transformers cannot read it, or its numbers are not sound.
    """
    if (plain := plain_config(raw)) is not None:
        return plain
    from transformers import AutoConfig

    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise DamagedError(f"{where}: its {CONFIG} has no model_type. {DOWNLOAD_AGAIN}")
    _check_layer_counts(raw, where)
    keys = copy.deepcopy({key: value for key, value in raw.items() if key not in ("model_type", "auto_map")})
    try:
        config = AutoConfig.for_model(model_type, **keys)
        text = config.get_text_config()
        numbers = [text.num_hidden_layers, text.num_attention_heads, text.hidden_size, *head_geometry(text)]
    except Exception as error:  # transformers raises whatever its parts raise
        raise _not_read(model_type, where, error) from None
    if any(type(number) is not int or not 0 < number <= MAX_SIZE for number in numbers):
        raise DamagedError(
            f"{where}: its {CONFIG} gives no sound number of layers, heads and hidden units. {DOWNLOAD_AGAIN}"
        )
    return config


def _not_read(model_type: str, where: str, error: Exception) -> FastlockError:
    if model_type in REFUSED:
        return refused_family(model_type, where)
    problem = (
        f"{where}: transformers cannot read its {CONFIG} of model_type {model_type[:80]!a} ({type(error).__name__}: "
        f"{str(error)[:300]}). Download the checkpoint again, or upgrade transformers."
    )
    if model_type in FAMILIES:
        return DamagedError(problem)
    return UnsupportedError(f"{problem} Known families: {', '.join(sorted(FAMILIES))}.")


def _check_layer_counts(raw: Any, where: str) -> None:
    """Configs make lists as long as this number says: a hostile one must not fill the memory."""
    if isinstance(raw, list):
        for value in raw:
            _check_layer_counts(value, where)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if key in _LAYER_COUNTS and type(value) in (int, float) and value > MAX_LAYERS:
                raise DamagedError(
                    f"{where}: its {CONFIG} says {str(value)[:40]} layers, and no model has so many. {DOWNLOAD_AGAIN}"
                )
            _check_layer_counts(value, where)
