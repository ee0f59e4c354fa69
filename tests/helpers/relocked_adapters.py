"""The forward pass of an adapted model with d added and nothing folded, and what relocked adapters are compared by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import fastlock
from tests.helpers.adapters import layer_of, loaded
from tests.helpers.families import logits, tokens
from tests.helpers.quantised import gptq


@contextlib.contextmanager
def displaced(model: Any, lock: fastlock.Lock, strength: float = 6.0) -> Iterator[None]:
    """Add d to what enters the adapted output projections."""
    hooks = []
    for layer, displacement in lock.displacement(strength).items():
        module = layer_of(model, layer)
        d = torch.zeros(module.in_features, dtype=torch.float64)
        for head, value in zip(displacement.heads, displacement.values, strict=True):
            d[head * len(value) : (head + 1) * len(value)] = value
        hooks.append(module.register_forward_pre_hook(lambda _, args, d=d: (args[0] + d.to(args[0]), *args[1:])))
    yield
    for hook in hooks:
        hook.remove()


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    """What an adapter over a base says, in float64."""
    return logits(loaded(base, adapter), tokens())


def displaced_logits(base: Path, adapter: Path, lock: fastlock.Lock, strength: float = 6.0) -> torch.Tensor:
    """What it would say with the lock, in float64: the truth."""
    model = loaded(base, adapter)
    with displaced(model, lock, strength):
        return logits(model, tokens())


def quantised_base(base: Path, directory: Path) -> Path:
    """A tiny base again, its output projections as random GPTQ ones."""
    directory.mkdir()
    config = json.loads((base / "config.json").read_text())
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.o_proj"
        packed, config["quantization_config"], _ = gptq(64, 128, seed=layer)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
