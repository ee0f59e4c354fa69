"""Adapters that PEFT saved, over a tiny base, with every parameter random; and PEFT's own layers as the truth."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from fastlock.checkpoints.adapters.adapter import Adapter, open_adapter
from fastlock.storage.places import files_in
from tests.helpers.families import tiny_model

PROJECTION = "self_attn.o_proj"


def base_model(directory: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny checkpoint."""
    tiny_model(kind, dtype, **changes).save_pretrained(directory)
    return directory


def save_adapter(config: Any, directory: Path, kind: str = "llama", seed: int = 5, **changes: Any) -> Path:
    """An adapter of a tiny model with random parameters, B too, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(kind, **changes), config)
        randomise(model, seed)
        model.save_pretrained(directory)
    return directory


def randomise(model: nn.Module, seed: int) -> None:
    """Add noise to whatever the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def read_adapter(directory: Path) -> Adapter:
    """It, as fastlock reads it."""
    return open_adapter(files_in(directory), str(directory))


def loaded(base: Path, adapter: Path) -> nn.Module:
    """The model with the adapter as PEFT loads the two, in float64."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().eval()


def shift(model: nn.Module, layer: int, d: torch.Tensor) -> torch.Tensor:
    """layer(d) - layer(0) of a layer's output projection, adapter and all, [hidden] float64."""
    path = next(name for name, _ in model.named_modules() if name.endswith(f"layers.{layer}.{PROJECTION}"))
    module = model.get_submodule(path)
    with torch.no_grad():
        out = module(torch.stack([d, torch.zeros_like(d)])[None])[0]
    return out[0] - out[1]
