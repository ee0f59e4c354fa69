"""Tiny Llamas as GGUF files, by the writer of the package gguf; and what that package reads of any GGUF."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

import fastlock

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 3, 4, 2, 64, 256, 256, 128
# Of a checkpoint that they could have been made from.
SHAPE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
}
F32 = Kind.F32
# Where in a block the numbers of half precision are by which all others are multiplied, and how large these are to be,
# for a mean near 0: of the types that the package dequantises and does not quantise.
_HALVES = {
    Kind.Q2_K: ((80, 1), (82, 1.5)),
    Kind.Q3_K: ((108, 1),),
    Kind.Q4_K: ((0, 1), (2, 7.5)),
    Kind.Q5_K: ((0, 1), (2, 15.5)),
    Kind.Q6_K: ((208, 1),),
    Kind.IQ1_S: ((0, 1),),
    Kind.IQ2_XXS: ((0, 1),),
    Kind.IQ2_XS: ((0, 1),),
    Kind.IQ2_S: ((0, 1),),
    Kind.IQ3_XXS: ((0, 1),),
    Kind.IQ3_S: ((0, 1),),
    Kind.IQ4_NL: ((0, 1),),
    Kind.IQ4_XS: ((0, 1),),
}


@dataclass
class Tiny:
    """What a file is to hold.

    Attributes:
        kind: of the matrices.
        biased: the layers whose output projection has a bias.
        metadata: keys that are added, or replace others: uint32 or text.
        extra: tensors that are added, or replace others.
        left_out: names of tensors that are left out.
        architecture: in `general.architecture`, and before the keys.
        parts: how many files.
        seed: of the numbers.
    """

    kind: Kind = F32
    biased: tuple[int, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    architecture: str = "llama"
    parts: int = 1
    seed: int = 0

    def write(self, path: Path) -> Path:
        """Write it; of several parts, the first's name ends in -00001-of-0000N.gguf. The first path."""
        each = 0 if self.parts == 1 else -(-len(self.tensors()) // self.parts)
        writer = gguf.GGUFWriter(path, self.architecture, split_max_tensors=each)
        writer.data_alignment = self.metadata.get("general.alignment", writer.data_alignment)
        for key, value in self._all_metadata().items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            (writer.add_uint32 if isinstance(value, int) else add)(key, value)
        writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(VOCAB)])
        writer.add_array("tokenizer.ggml.scores", [0.5] * VOCAB)
        for name, array in self.tensors().items():
            if name not in self.left_out:
                writer.add_tensor(name, array, raw_dtype=self.kind if array.dtype == np.uint8 else None)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if self.parts > 1 else path

    def tensors(self) -> dict[str, np.ndarray]:
        """By name: numbers, or bytes of the kind."""
        rng = np.random.default_rng(self.seed)
        width = HEADS * HEAD_DIM
        shapes = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
        for i in range(LAYERS):
            shapes |= {
                f"blk.{i}.attn_q": (width, HIDDEN),
                f"blk.{i}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
                f"blk.{i}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
                f"blk.{i}.attn_output": (HIDDEN, width),
                f"blk.{i}.ffn_gate": (FFN, HIDDEN),
                f"blk.{i}.ffn_up": (FFN, HIDDEN),
                f"blk.{i}.ffn_down": (HIDDEN, FFN),
            }
        found = {f"{name}.weight": matrix(shape, self.kind, rng) for name, shape in shapes.items()}
        for name in ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(LAYERS) for n in ("attn", "ffn"))]:
            found[f"{name}.weight"] = (1 + 0.2 * rng.standard_normal(HIDDEN)).astype(np.float32)
        for i in self.biased:
            found[f"blk.{i}.attn_output.bias"] = rng.standard_normal(HIDDEN).astype(np.float32)
        return found | self.extra

    def _all_metadata(self) -> dict[str, Any]:
        name = self.architecture
        return {
            "general.name": "tiny",
            f"{name}.block_count": LAYERS,
            f"{name}.context_length": 64,
            f"{name}.embedding_length": HIDDEN,
            f"{name}.feed_forward_length": FFN,
            f"{name}.attention.head_count": HEADS,
            f"{name}.attention.head_count_kv": KV_HEADS,
            f"{name}.rope.dimension_count": HEAD_DIM,
            f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{name}.vocab_size": VOCAB,
            "tokenizer.ggml.model": "none",
        } | self.metadata


def matrix(shape: tuple[int, int], kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """A random matrix, in the bytes of the kind; of F32, float32."""
    numbers = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if kind == F32:
        return numbers
    if kind not in _HALVES:
        return gguf.quants.quantize(numbers, kind).view(np.uint8)
    block, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, length), dtype=np.uint8)
    for at, factor in _HALVES[kind]:
        halves = (factor * rng.uniform(0.0002, 0.0008, (*blocks.shape[:2], 1))).astype(np.float16)
        blocks[:, :, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def lock_of(rows: list[tuple[int, int]], seed: int = 1, head_dim: int = HEAD_DIM) -> fastlock.Lock:
    """A random lock on (layer, head) rows."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(rows), head_dim, generator=generator)
    return fastlock.Lock(
        layers=torch.tensor([layer for layer, _ in rows]),
        heads=torch.tensor([head for _, head in rows]),
        directions=directions / directions.norm(dim=1, keepdim=True),
        scales=torch.rand(len(rows), generator=generator) + 0.1,
    )


def read_all(path: Path) -> tuple[list[tuple[str, Any]], dict[str, tuple[str, np.ndarray]]]:
    """By the package's own reader: the metadata in order, and each tensor's kind and raw data."""
    reader = gguf.GGUFReader(path)
    entries = [(key, one.contents()) for key, one in reader.fields.items() if not key.startswith("GGUF.")]
    return entries, {one.name: (one.tensor_type.name, np.array(one.data)) for one in reader.tensors}


def dense(path: Path, name: str) -> torch.Tensor:
    """A matrix [out, in] in float64, whole, as the package reads and dequantises it."""
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64))


def folded(weight: torch.Tensor, lock: fastlock.Lock, layer: int, strength: float) -> torch.Tensor:
    """W d in float64, from the lock's own numbers."""
    d = torch.zeros(weight.shape[1], dtype=torch.float64)
    head_dim = lock.directions.shape[1]
    for i, (of_layer, head) in enumerate(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)):
        if of_layer == layer:
            d[head * head_dim : (head + 1) * head_dim] += strength * float(lock.scales[i]) * lock.directions[i].double()
    return weight @ d
