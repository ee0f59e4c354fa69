"""When a Mistral or Qwen2 is the same model as a Llama, whose code has a place for the bias."""

from __future__ import annotations

from typing import Any

from fastlock.architectures.families import head_geometry
from fastlock.errors import UnsupportedError

# The families that can be written as a Llama, and the class of each that can.
LLAMA_FORM = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# The keys of a Mistral's or Qwen2's config without a sliding window that a Llama's does not share.
_NOT_OF_LLAMA = (
    "model_type architectures sliding_window use_sliding_window max_window_layers layer_types head_dim"
).split()


def llama_config(config: Any, name: str, works: str) -> Any:
    """The config under which a Mistral or Qwen2 is computed by Llama's code, with a place for the bias.

    Args:
        config: the model's own, as transformers reads it.
        name: its class, for messages.
        works: what would work instead, for messages.

    Returns:
        A `transformers.LlamaConfig` with `attention_bias` set.

    Raises:
        UnsupportedError: it would not be the same model, bit for bit: it is another class, has a sliding window, or
            has a config that a Llama cannot have.
    """
    from transformers import LlamaConfig

    lost = f"{name}: transformers has no place for an output projection bias in a {config.model_type} checkpoint"
    if LLAMA_FORM.get(config.model_type) != name:
        raise UnsupportedError(f"{lost} and would drop the lock, without an error, when loading it. {works}")
    if (window := active_window(config)) is not None:
        raise UnsupportedError(
            f"{lost}, and the Llama form is not exact with a sliding window of {window} tokens. {works} If the model "
            "is never run beyond that window, set config.sliding_window = None and save it again."
        )
    keys = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_LLAMA}
    _, head_dim = head_geometry(config)
    try:
        llama = LlamaConfig(**keys | {"head_dim": head_dim, "mlp_bias": False, "attention_bias": True})
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"{lost}, and a Llama cannot have this config ({error}). {works}") from None
    llama.dtype = config.dtype
    return llama


def active_window(config: Any) -> int | None:
    """The sliding window of a Mistral or Qwen2, in tokens; None where no layer has one."""
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and "sliding_attention" not in config.layer_types:
        return None
    return window
