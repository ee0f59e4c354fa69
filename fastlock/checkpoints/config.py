"""The config.json of a stranger's checkpoint, read safely: it runs no code, and no number in it fills the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlock.architectures.families import FAMILIES, REFUSED, head_geometry
from fastlock.checkpoints.plain_config import plain_config
from fastlock.errors import FastlockError
from fastlock.storage.files import CONFIG, File, parse_object, read_all

MAX_LAYERS = 10_000

MAX_SIZE = 2**20

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def read_config(files: Mapping[str, File], where: str) -> dict[str, Any]:
    """The parsed config.json.

    Raises:
        FastlockError: there is none, or it is no JSON object.
    """
    if CONFIG not in files:
        raise FastlockError(f"{where}: holds no {CONFIG}. Give a checkpoint's directory ({CONFIG}, *.safetensors).")
    return parse_object(read_all(files[CONFIG], f"{where}/{CONFIG}"), f"{where}/{CONFIG}")


def transformers_config(raw: dict[str, Any], where: str) -> Any:
    """What transformers makes of a config.json, of known families only, and never running code of the checkpoint's."""
    if (plain := plain_config(raw)) is not None:
        return plain
    from transformers import AutoConfig

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise FastlockError(f"{where}: its {CONFIG} names no model_type. Get the checkpoint again.")
    _check_layer_counts(raw, where)
    keys = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    try:
        config = AutoConfig.for_model(kind, **keys)
        text = config.get_text_config()
        numbers = [text.num_hidden_layers, text.num_attention_heads, text.hidden_size, *head_geometry(text)]
    except Exception as error:  # transformers raises whatever its parts raise
        if kind in REFUSED:
            raise FastlockError(f"{where} ({kind}) {REFUSED[kind]}. It can't be relocked exactly.") from None
        known = "" if kind in FAMILIES else f" Known families: {', '.join(sorted(FAMILIES))}."
        raise FastlockError(
            f"{where}: transformers can't read its {CONFIG} of model_type {kind[:80]!a} ({type(error).__name__}: "
            f"{str(error)[:300]}). Get the checkpoint again, or upgrade transformers.{known}"
        ) from None
    if any(type(number) is not int or not 0 < number <= MAX_SIZE for number in numbers):
        raise FastlockError(f"{where}: its {CONFIG} gives no sound number of layers, heads and hidden units.")
    return config


def _check_layer_counts(raw: Any, where: str) -> None:
    """Configs make lists as long as this number says: a hostile one must not fill the memory."""
    if isinstance(raw, list):
        for value in raw:
            _check_layer_counts(value, where)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            if key in _LAYER_COUNTS and type(value) in (int, float) and value > MAX_LAYERS:
                raise FastlockError(f"{where}: its {CONFIG} says {str(value)[:40]} layers, which no model has.")
            _check_layer_counts(value, where)
