"""Checkpoints of real models' shapes on disk: every tensor in the headers, but holes for all data that is not needed.

Only output projections hold numbers, so that 245 GB take as much of the disk as the locked layers do.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.lib import workloads
from fastlock import Lock

PROJECTION = "model.layers.{}.self_attn.o_proj.weight"
ITEMSIZE = 2
# Each layer begins elsewhere in the same random numbers: odd, so that no two layers of a model are alike.
SHIFT = 1_000_003


@dataclass(frozen=True)
class Shape:
    """A Llama, how it is cut into files, and the lock that goes with it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    shards: int
    locked_heads: int
    locked_layers: int
    released: str = ""
    head_dim: int = 128
    tied: bool = False

    @property
    def projection(self) -> tuple[int, int]:
        """The output projection of one layer."""
        return self.hidden, self.heads * self.head_dim


SHAPES = {
    "tiny": Shape(64, 3, 4, 2, 96, 128, 1, 4, 2, head_dim=16),
    "135m": Shape(576, 30, 9, 3, 1536, 49152, 1, 9, 6, head_dim=64, tied=True),  # SmolLM2
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, 4, 24, 12, workloads.SHAPES["8B"].released),  # Llama-3
    "70b": Shape(8192, 80, 64, 8, 28672, 128256, 30, 48, 21, workloads.SHAPES["70B"].released),
    "123b": Shape(12288, 88, 96, 8, 28672, 32768, 51, 48, 30),  # Mistral-Large-2, as a Llama
}


def lock_for(shape: str) -> tuple[Lock, str]:
    """The released lock if it lies beside the repository, else a random one of its geometry; and which it is."""
    s = SHAPES[shape]
    of_lock = (s.hidden, s.layers, s.heads, s.locked_heads, s.locked_layers)
    return workloads.lock_for(workloads.Shape(shape, *of_lock, s.released or "none", s.head_dim))


def sparse_checkpoint(
    directory: str | os.PathLike[str], shape: str, lock: Lock | None = None, seed: int = 0, margin: int = 0
) -> Path:
    """Make a checkpoint in bfloat16: random numbers in the output projections, holes everywhere else.

    Args:
        directory: where; it may not exist yet.
        shape: of `SHAPES`.
        lock: fill the output projections of its layers only; None: of all layers.
        seed: of the numbers.
        margin: bytes to fill after each header and around each projection filled, so that whoever reads too much reads
            it from the disk (of a hole nothing is).
    """
    directory, s = Path(directory), SHAPES[shape]
    directory.mkdir(parents=True)
    layers = range(s.layers) if lock is None else sorted(set(lock.layers.tolist()))
    filled = {PROJECTION.format(layer): layer for layer in layers}
    numbers = _numbers(s, seed)
    shards = _shards(s)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        _write_shard(directory / name, tensors, filled, numbers, margin)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(sum, map(_sizes, shards)))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(model_config(s), indent=2) + "\n")
    return directory


def locked_ranges(directory: Path, lock: Lock) -> list[tuple[Path, int, int]]:
    """File, offset and length of the output projection of every locked layer."""
    ranges = []
    wanted = {PROJECTION.format(layer) for layer in lock.layers.tolist()}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name in sorted(wanted & header.keys()):
            begin, end = header[name]["data_offsets"]
            ranges.append((path, 8 + size + begin, end - begin))
    return ranges


def model_tensors(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield "model.embed_tokens.weight", (s.vocab, s.hidden)
    for layer in range(s.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (s.hidden,)
        yield f"{prefix}.mlp.down_proj.weight", (s.hidden, s.intermediate)
        yield f"{prefix}.mlp.gate_proj.weight", (s.intermediate, s.hidden)
        yield f"{prefix}.mlp.up_proj.weight", (s.intermediate, s.hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (s.hidden,)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, s.hidden)
        yield PROJECTION.format(layer), s.projection
        yield f"{prefix}.self_attn.q_proj.weight", (q, s.hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, s.hidden)
    yield "model.norm.weight", (s.hidden,)
    if not s.tied:
        yield "lm_head.weight", (s.vocab, s.hidden)


def _shards(s: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file, in order, cut where equal parts would be."""
    tensors = dict(model_tensors(s))
    whole = sum(_sizes(tensors))
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(s.shards)]
    start = 0
    for (name, shape), size in zip(tensors.items(), _sizes(tensors), strict=True):
        shards[start * s.shards // whole][name] = shape
        start += size
    return shards


def _sizes(tensors: dict[str, tuple[int, ...]]) -> list[int]:
    return [torch.Size(shape).numel() * ITEMSIZE for shape in tensors.values()]


def _numbers(s: Shape, seed: int) -> memoryview:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(s.projection, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    array: Any = numbers.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], filled: dict[str, int], numbers: memoryview, margin: int
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = list(itertools.accumulate(_sizes(tensors)))
    for (name, shape), begin, end in zip(tensors.items(), [0, *ends], ends, strict=False):
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = 8 + len(encoded)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded + numbers[:margin])
        for name in sorted(tensors.keys() & filled.keys()):
            begin, end = header[name]["data_offsets"]
            first = filled[name] * SHIFT * ITEMSIZE % len(numbers)
            file.seek(data + max(0, begin - margin))
            for piece in (numbers[: min(begin, margin)], numbers[first:], numbers[:first], numbers[:margin]):
                file.write(piece)
        file.truncate(data + ends[-1])


def model_config(s: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": s.tied,
        "vocab_size": s.vocab,
    }
