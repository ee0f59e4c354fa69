"""What a LoRA is scaled by, s: by PEFT's rule, and by those of the stacks that have their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastlock.checkpoints.adapters.methods.method import Scaling
from fastlock.checkpoints.adapters.methods.patterns import value_for


def rank_in(config: Mapping[str, Any], path: str, where: str) -> Any:
    """The rank that a config gives to a module, whatever that is. Raises as `value_for`."""
    return value_for(config.get("rank_pattern"), path, config.get("r"), "rank_pattern", where)


def alpha_in(config: Mapping[str, Any], path: str, where: str) -> Any:
    """The α that a config gives to a module, whatever that is. Raises as `value_for`."""
    return value_for(config.get("alpha_pattern"), path, config.get("lora_alpha"), "alpha_pattern", where)


def peft_scale(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """s as PEFT, transformers and vLLM have it, of a module's own α and rank."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def stack_scale(scaling: Scaling, alpha: float, whole_rank: float, rank: int) -> float:
    """s as a stack with a rule of its own has it.

    Args:
        scaling: "sglang" or "llama.cpp".
        alpha: the config's α, whatever its patterns say.
        whole_rank: the config's rank, likewise.
        rank: that of the module's tensors.
    """
    if scaling == "llama.cpp":  # `llama_adapter_lora_weight.get_scale` of llama-adapter.h
        return alpha / rank if alpha else 1.0
    return alpha / whole_rank  # `LoRAAdapter.__init__` of sglang/srt/lora/lora.py
