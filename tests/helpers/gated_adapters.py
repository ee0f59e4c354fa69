"""The forward pass of an adapted model with a gate acting and nothing folded, row by row of the lock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import fastlock
from tests.helpers.adapters import layer_of, loaded
from tests.helpers.families import logits, tokens


def gated_logits(base: Path, adapter: Path | None, lock: fastlock.Lock, strength: float) -> torch.Tensor:
    """What a base, with an adapter or without, would say with the gate of a lock, in float64: the truth."""
    model: Any = loaded(base, adapter) if adapter is not None else _alone(base)
    rows = list(
        zip(lock.layers.tolist(), lock.heads.tolist(), lock.readers.double(), lock.writers.double(), strict=True)
    )

    def gate(layer: int) -> Any:
        of_layer = [(slice(h * v.shape[1], (h + 1) * v.shape[1]), v, u) for at, h, v, u in rows if at == layer]

        def shift(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            read = sum(torch.einsum("btd,rd->btr", x[..., where], v) for where, v, _ in of_layer)
            moved = x.clone()
            for where, _, u in of_layer:
                moved[..., where] += strength * torch.einsum("btr,rd->btd", read, u)
            return (moved, *args[1:])

        return shift

    for layer in set(lock.layers.tolist()):
        layer_of(model, layer).register_forward_pre_hook(gate(layer))
    return logits(model, tokens())


def _alone(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager").eval()
