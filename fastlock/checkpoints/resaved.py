"""Checkpoints that transformers saved from a relocked model: the biases are among its other weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastlock.errors import FastlockError
from fastlock.models.saving import in_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def out_of_llama_form(model: PreTrainedModel, original: Any, source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model in the class that it had before it was saved as a Llama."""
    from transformers import AutoConfig, MistralForCausalLM, Qwen2ForCausalLM

    classes: dict[str, Callable[[Any], PreTrainedModel]] = {"mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    try:
        kind = original["model_type"]
        config = AutoConfig.for_model(**original)
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not (name.endswith(".self_attn.o_proj.bias") and not tensor.count_nonzero())
        }
        restored = in_class(classes[kind], config, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FastlockError(
            f"{source}: the receipt does not say rightly what the model was before ({error}). "
            "Start from the original checkpoint."
        ) from None
    restored.generation_config = model.generation_config
    return restored
