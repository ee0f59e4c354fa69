"""The LoRA config that leaves a band alone. Importing this imports PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlock.errors import UnsupportedError
from fastlock.finetuning.decoder_layers import DecoderLayers
from fastlock.locks.band import Band

# Modules of a mixture of experts in older transformers. PEFT takes them for the names of parameters of experts, which
# its `exclude_modules` does not reach.
_OF_EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraOutsideConfig(LoraConfig):
    """A `LoraConfig` that says so where PEFT would go on to adapt parameters in spite of `exclude_modules`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "target_parameters" and value:
            raise UnsupportedError(
                f"PEFT would adapt the experts of every layer ({', '.join(sorted(value))}), those of the band as well. "
                "Give the model to lora_outside too (model=): the adapters are then of its attention alone."
            )
        super().__setattr__(name, value)


def has_experts(found: DecoderLayers) -> bool:
    """Whether a model keeps the experts of its layers in one parameter, as transformers 5 does."""
    return any(parameter.dim() == 3 for layer in found.layers for parameter in layer.parameters())


def linear_names(model: nn.Module, found: DecoderLayers, band: Band) -> list[str]:
    """The linear modules of the decoder's layers outside a band, but for those that PEFT takes for experts."""
    inside = tuple(f"{found.path}.{number}." for number in band.layers)
    names: Iterable[str] = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [
        name
        for name in names
        if name.startswith(f"{found.path}.")
        and not name.startswith(inside)
        and name.rpartition(".")[2] not in _OF_EXPERTS
    ]
