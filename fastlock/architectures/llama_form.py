"""When a Mistral or Qwen2 is the same model as a Llama, whose code has a place for the bias.

The config is changed key by key, never made anew: releases of transformers before 5 read other keys than those after
(`rope_theta`, `torch_dtype`), and each must find what it found before.
"""

from __future__ import annotations

import copy
from typing import Any

from fastlock.architectures.families import head_geometry
from fastlock.errors import UnsupportedError

# The families that can be written as a Llama, and the class of each that can.
LLAMA_FORM = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# What a Llama is told instead.
_OF_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "mlp_bias": False,
}

# What selects something that a Llama does not have; where it is active, there is no Llama form.
_NOT_OF_LLAMA = "sliding_window use_sliding_window max_window_layers layer_types".split()

# What a Mistral or Qwen2 does not read, and a Llama does: transformers 4.46, and vLLM.
_OF_LLAMA_ALONE = "pretraining_tp qkv_bias".split()

# Where a config.json leaves these out, a Llama would take other values; the same from transformers 4.46 to 5.23.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "bos_token_id": None,
        "eos_token_id": None,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
    },
}


def llama_config(config: Any, keys: dict[str, Any], name: str, works: str) -> dict[str, Any]:
    """The config under which a Mistral or Qwen2 is computed by Llama's code, with a place for the bias.

    Args:
        config: the model's own, as transformers reads it.
        keys: the same as it is written, in config.json; they are not changed.
        name: its class, for messages.
        works: what would work instead, for messages.

    Returns:
        The keys of the new config.json: those of the old one as they were, but for what tells the two apart.

    Raises:
        UnsupportedError: it would not be the same model, bit for bit: it is another class, has a sliding window, or
            has a config that a Llama cannot have.
    """
    from transformers import LlamaConfig

    lost = f"{name}: transformers has no place for an output projection bias in a {config.model_type} checkpoint"
    if LLAMA_FORM.get(config.model_type) != name:
        raise UnsupportedError(f"{lost} and would drop the lock, without an error, when loading it. {works}")
    if (why := _why_not(config, keys)) is not None:
        raise UnsupportedError(f"{lost}, and {why[0]}. {works}{why[1]}")
    kept = {key: value for key, value in keys.items() if key not in (*_NOT_OF_LLAMA, *_OF_LLAMA_ALONE)}
    added = {key: value for key, value in _DEFAULTS[config.model_type].items() if key not in kept}
    new = kept | added | _OF_LLAMA
    try:
        llama = LlamaConfig(**copy.deepcopy(new))  # it changes what is in them
    except Exception as error:  # transformers raises whatever its parts raise
        raise UnsupportedError(f"{lost}, and a Llama cannot have this config ({error}). {works}") from None
    if (other := _difference(config, llama)) is not None:
        raise UnsupportedError(f"{lost}, and a Llama reads its {other} in another way. {works}")
    return new


def _why_not(config: Any, keys: dict[str, Any]) -> tuple[str, str] | None:
    """Why a Llama would compute something else, and what else works; None where it would not."""
    if (window := active_window(config)) is not None:
        return (
            f"the Llama form is not exact with a sliding window of {window} tokens",
            " If the model is never run beyond that window, set config.sliding_window = None and save it again.",
        )
    if keys.get("dual_chunk_attention_config") is not None:
        return (
            "in the Llama form vLLM would leave out the dual chunk attention that its config asks for",
            " If the model is never run on such long texts, remove dual_chunk_attention_config from config.json.",
        )
    if config.model_type == "mistral" and _scales(keys.get("rope_scaling")):
        return "transformers before 4.48 ignores rope_scaling in a Mistral, and would not in the Llama form", ""
    return None


def active_window(config: Any) -> int | None:
    """The sliding window of a Mistral or Qwen2, in tokens; None where no layer has one."""
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and "sliding_attention" not in config.layer_types:
        return None
    return window


def _scales(rope: Any) -> bool:
    return rope is not None and not (isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "default")


def _difference(config: Any, llama: Any) -> str | None:
    """The first key that both have, and that does not say the same in both; None where there is none."""
    if head_geometry(config) != head_geometry(llama):
        return "head_dim"
    ours, theirs = llama.to_dict(), config.to_dict()
    shared = sorted(ours.keys() & theirs.keys() - _OF_LLAMA.keys() - set(_OF_LLAMA_ALONE))
    return next((key for key in shared if ours[key] != theirs[key]), None)
