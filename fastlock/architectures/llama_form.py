"""When a Mistral or Qwen2 is the same model as a Llama, whose code has a place for the bias."""

from __future__ import annotations

from typing import Any

from fastlock.architectures.families import head_geometry
from fastlock.errors import FastlockError

# The families that can be written as a Llama, and the class that can.
LLAMA_FORM = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# What a Llama's config does not share with that of a Mistral or Qwen2 which has no sliding window.
_NOT_OF_LLAMA = (
    "model_type architectures sliding_window use_sliding_window max_window_layers layer_types head_dim"
).split()


def llama_config(config: Any, name: str, works: str) -> Any:
    """The config under which a Mistral or Qwen2 is computed by Llama's code, with a place for the bias.

    Args:
        config: the model's own.
        name: its class, for messages.
        works: what would work instead, for messages.

    Raises:
        FastlockError: it would not be the same model, to the bit.
    """
    from transformers import LlamaConfig

    lost = f"{name}: transformers has no place for an output projection bias in a {config.model_type} checkpoint"
    if LLAMA_FORM.get(config.model_type) != name:
        raise FastlockError(f"{lost} and would drop the lock in silence when loading it. {works}")
    if (window := active_window(config)) is not None:
        raise FastlockError(
            f"{lost}, and the Llama form is not exact with a sliding window of {window} tokens. {works} If the model "
            "is never run beyond that window, set config.sliding_window = None and save again."
        )
    keys = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_LLAMA}
    _, head_dim = head_geometry(config)
    try:
        llama = LlamaConfig(**keys | {"head_dim": head_dim, "mlp_bias": False, "attention_bias": True})
    except (ValueError, TypeError) as error:
        raise FastlockError(f"{lost}, and a Llama can't have this config ({error}). {works}") from None
    llama.dtype = config.dtype
    return llama


def active_window(config: Any) -> int | None:
    """The sliding window of a Mistral or Qwen2; None where no layer has one."""
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and "sliding_attention" not in config.layer_types:
        return None
    return window
