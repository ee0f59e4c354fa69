"""What the benchmarks fold: random output projections of the shape of real models, and the released locks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bench.lib import machine
from bench.lib.tiny import sized
from fastlock import Lock
from fastlock.kernels.fold import reference
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Displacement

STRENGTH = 6.0
RELEASED_LOCKS = machine.REPOSITORY.parent / "shared" / "released_locks"
# The rotation reads this many times the cache before it comes back to the same weights, if memory allows.
COLD = 4
ZOO_BYTES = {"cpu": 6 * 10**9, "cuda": 27 * 10**9}
# The most models in one call, of the shape that this is measured for.
MOST_MODELS = sized(64, 2)
# A prime length, so that tiling it makes no two rows of a weight alike.
NOISE = 4_194_301


@dataclass(frozen=True)
class Shape:
    """The attention geometry of a base, and the size of its lock."""

    name: str
    hidden: int
    num_layers: int
    num_heads: int
    locked_heads: int
    locked_layers: int
    released: str
    head_dim: int = 128


SHAPES = sized(
    {
        "8B": Shape("8B", 4096, 32, 32, 24, 12, "Meta-Llama-3-8B-Instruct.safelock"),
        "70B": Shape("70B", 8192, 80, 64, 48, 21, "Meta-Llama-3-70B-Instruct_48.safelock"),
        "Nemo": Shape("Nemo", 5120, 40, 32, 24, 12, "Mistral_Nemo_12B.safelock"),
    },
    tiny={
        "8B": Shape("8B", 48, 4, 8, 4, 2, "none", head_dim=32),
        "70B": Shape("70B", 64, 6, 8, 6, 3, "none", head_dim=64),
        "Nemo": Shape("Nemo", 80, 4, 8, 5, 2, "none", head_dim=32),
    },
)


@dataclass(frozen=True)
class Zoo:
    """Random checkpoints of one shape and dtype: of each, the output projections of the locked layers.

    Attributes:
        lock_source: which lock it is.
        models: per model the weights, [hidden, num_heads * head_dim] each, by layer.
        copy: bytes a second of a large copy on this device, read plus written.
        empty: seconds on the device of a launch of the kernel that folds next to nothing; None on a CPU.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    lock: Lock
    lock_source: str
    models: list[list[torch.Tensor]]
    copy: float
    empty: float | None

    @cached_property
    def displacements(self) -> dict[int, Displacement]:
        return self.lock.displacement(STRENGTH)

    @property
    def locked_bytes(self) -> int:
        """Bytes of the locked columns of one model."""
        return locked_bytes(self.shape, self.dtype)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the whole matrices of one model's locked layers."""
        return matrix_bytes(self.shape, self.dtype)

    @property
    def bias_bytes(self) -> int:
        """Bytes of the biases written for one model."""
        return self.shape.locked_layers * self.shape.hidden * self.dtype.itemsize

    def shell(self, weights: list[torch.Tensor]) -> Any:
        """A model as a real LlamaForCausalLM; only what relocking may read is there, the rest is on meta."""
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = self.shape
        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=8,
            head_dim=shape.head_dim,
        )
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
            model.to(self.dtype)
        for layer, weight in zip(self.displacements, weights, strict=True):
            model.model.layers[layer].self_attn.o_proj.weight = nn.Parameter(weight, requires_grad=False)
        return model


def locked_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.locked_heads * shape.head_dim * shape.hidden * dtype.itemsize


def matrix_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.locked_layers * shape.num_heads * shape.head_dim * shape.hidden * dtype.itemsize


def make_zoo(shape: Shape, dtype: torch.dtype, device: torch.device, copy: float, empty: float | None) -> Zoo:
    """Enough random models that the locked columns of all are several times the cache, if memory allows."""
    wanted = math.ceil(COLD * machine.cache_bytes() / locked_bytes(shape, dtype))
    if device.type == "cuda" and (shape.name, dtype) == ("8B", torch.bfloat16):
        wanted = max(wanted, MOST_MODELS)
    count = max(1, min(wanted, ZOO_BYTES[device.type] // matrix_bytes(shape, dtype)))
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(NOISE, device=device, generator=generator).mul_(0.02).to(dtype)
    size = (shape.hidden, shape.num_heads * shape.head_dim)
    weights = torch.empty(count, shape.locked_layers, *size, dtype=dtype, device=device)
    flat = weights.view(-1)
    for start in range(0, flat.numel(), NOISE):
        piece = flat[start : start + NOISE]
        piece.copy_(noise[: len(piece)])
    lock, source = lock_for(shape)
    return Zoo(shape, dtype, device, lock, source, [list(model) for model in weights], copy, empty)


def lock_for(shape: Shape) -> tuple[Lock, str]:
    """The released lock if it lies beside the repository, else a random one of its geometry; and which it is."""
    path = RELEASED_LOCKS / shape.released
    heads = f"{shape.locked_heads} heads in {shape.locked_layers} of {shape.num_layers} layers"
    if path.is_file():
        return Lock.load(path), f"released: {shape.released}, {heads}"
    return random_lock(shape), f"random, of the released lock's geometry: {heads}"


def random_lock(shape: Shape) -> Lock:
    generator = torch.Generator().manual_seed(1)
    layers = torch.randperm(shape.num_layers, generator=generator)[: shape.locked_layers]
    more = torch.randint(shape.locked_layers, (shape.locked_heads - shape.locked_layers,), generator=generator)
    directions = torch.randn(shape.locked_heads, shape.head_dim, generator=generator)
    return Lock(
        layers=torch.cat([layers, layers[more]]),
        heads=torch.randperm(shape.num_heads, generator=generator)[: shape.locked_heads],
        directions=directions / directions.norm(dim=1, keepdim=True),
        scales=torch.rand(shape.locked_heads, generator=generator) + 0.1,
    )


def errors(
    columns: Sequence[HeadColumns],
    values: Sequence[torch.Tensor],
    folds: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
) -> dict[str, float]:
    """How far folds are from the exact ones, in float64.

    Returns:
        bounds: the largest error, in units of `reference.error_bound`: right if at most 1; infinite for NaN, and
            where there is none.
        relative: the norm of all errors over the norm of all exact folds.
    """
    worst, error_norm, norm = 0.0, 0.0, 0.0
    for of_site, value, fold, bias in zip(columns, values, folds, biases, strict=True):
        exact = reference.exact_fold(of_site, value, bias)
        if fold is None:
            return {"bounds": math.inf, "relative": math.inf}
        error = (fold.detach().to(exact) - exact).abs()
        ratio = (error / reference.error_bound(of_site, value, bias)).nan_to_num(nan=math.inf)
        worst = max(worst, float(ratio.max()))
        error_norm += float(error.square().sum())
        norm += float(exact.square().sum())
    return {"bounds": worst, "relative": math.sqrt(error_norm / norm)}
