"""Checkpoints of a real model's shape whose output projections are quantised: numbers there, holes everywhere else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.sparse_checkpoints import PROJECTION, SHAPES, Shape, model_config, model_tensors
from fastlock import Lock

GROUP = 128
SIZES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
# By suffix: dtype, shape, and the bytes of a layer's tensor, made of a generator and their number.
Tensors = dict[str, tuple[str, tuple[int, ...], Callable[[np.random.Generator, int], bytes]]]


def _any(rng: np.random.Generator, length: int) -> bytes:
    return rng.bytes(length)


def _int8(rng: np.random.Generator, length: int) -> bytes:
    return rng.integers(-127, 128, length, np.int8).tobytes()


def _float8(rng: np.random.Generator, length: int) -> bytes:
    """From 2**-6 to below 2**4, of either sign: no NaN."""
    return ((rng.integers(0, 2, length) << 7) | rng.integers(8, 88, length)).astype(np.uint8).tobytes()


def _scales8(rng: np.random.Generator, length: int) -> bytes:
    return rng.integers(40, 56, length).astype(np.uint8).tobytes()


def _scales16(rng: np.random.Generator, length: int) -> bytes:
    return rng.uniform(0.002, 0.004, length // 2).astype(np.float16).tobytes()


def _bfloat16(rng: np.random.Generator, length: int) -> bytes:
    return (rng.normal(0, 0.02, length // 2).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _scales_bfloat16(rng: np.random.Generator, length: int) -> bytes:
    return (rng.uniform(0.002, 0.004, length // 2).astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


def _scales32(rng: np.random.Generator, length: int) -> bytes:
    return rng.uniform(0.002, 0.004, length // 4).astype(np.float32).tobytes()


def _constant(data: bytes) -> Callable[[np.random.Generator, int], bytes]:
    return lambda _rng, _length: data


def _gptq(h: int, w: int) -> Tensors:
    groups = (np.arange(w) // GROUP).astype("<i4").tobytes()
    return {
        "g_idx": ("I32", (w,), _constant(groups)),
        "qweight": ("I32", (w // 8, h), _any),
        "qzeros": ("I32", (w // GROUP, h // 8), lambda _rng, length: b"\x77" * length),
        "scales": ("F16", (w // GROUP, h), _scales16),
    }


def _awq(h: int, w: int) -> Tensors:
    packed: Tensors = {"qweight": ("I32", (w, h // 8), _any), "qzeros": ("I32", (w // GROUP, h // 8), _any)}
    return packed | {"scales": ("F16", (w // GROUP, h), _scales16)}


def _w4a16(h: int, w: int) -> Tensors:
    return {
        "weight_packed": ("I32", (h, w // 8), _any),
        "weight_scale": ("BF16", (h, w // GROUP), _scales_bfloat16),
        "weight_shape": ("I64", (2,), _constant(struct.pack("<2q", h, w))),
    }


def _int8_rows(h: int, w: int) -> Tensors:
    return {"weight": ("I8", (h, w), _int8), "weight_scale": ("BF16", (h, 1), _scales_bfloat16)}


def _fp8_blocks(h: int, w: int) -> Tensors:
    blocks = (-(-h // GROUP), -(-w // GROUP))
    return {"weight": ("F8_E4M3", (h, w), _float8), "weight_scale_inv": ("F32", blocks, _scales32)}


def _nvfp4(h: int, w: int) -> Tensors:
    return {
        "weight_global_scale": ("F32", (1,), _constant(struct.pack("<f", 100.0))),
        "weight_packed": ("U8", (h, w // 2), _any),
        "weight_scale": ("F8_E4M3", (h, w // 16), _scales8),
    }


def _nf4(h: int, w: int) -> Tensors:
    blocks = h * w // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [h, w]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
    data = json.dumps(state).encode()
    codes = np.linspace(-1, 1, 16, dtype=np.float32).tobytes()
    return {
        "weight": ("U8", (h * w // 2, 1), _any),
        "weight.absmax": ("U8", (blocks,), _any),
        "weight.nested_absmax": ("F32", (-(-blocks // 256),), _scales32),
        "weight.nested_quant_map": ("F32", (256,), _constant(np.linspace(-1, 1, 256, dtype=np.float32).tobytes())),
        "weight.quant_map": ("F32", (16,), _constant(codes)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (len(data),), _constant(data)),
    }


def _plain(h: int, w: int) -> Tensors:
    return {"weight": ("BF16", (h, w), _bfloat16)}


# With the config that goes beside the tensors.
FORMATS: dict[str, tuple[Callable[[int, int], Tensors], dict[str, Any]]] = {
    "bf16": (_plain, {}),
    "GPTQ": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "AWQ": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "w4a16": (_w4a16, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "int8": (_int8_rows, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "FP8, blocks": (_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}),
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "NVFP4": (_nvfp4, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
}


def sparse_quantised(directory: Path, shape: str, layout: str, lock: Lock) -> Path:
    """Make a checkpoint in one file: random numbers in the locked layers' output projections, holes everywhere else.

    Args:
        directory: where; it may not exist yet.
        shape: of `SHAPES`.
        layout: of `FORMATS`.
        lock: whose layers are filled.
    """
    s = SHAPES[shape]
    of_projection, quantisation = FORMATS[layout]
    directory.mkdir(parents=True)
    written = of_projection(*s.projection)
    locked = set(lock.layers.tolist())
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    filled: dict[str, tuple[int, str]] = {}
    projections = {PROJECTION.format(layer): layer for layer in range(s.layers)}
    for name, tensor_shape in model_tensors(s):
        layer = projections.get(name)
        if layer is None:
            names[name] = ("BF16", tensor_shape)
            continue
        for suffix, (dtype, of_tensor, _) in written.items():
            named = name.removesuffix("weight") + suffix
            names[named] = (dtype, of_tensor)
            if layer in locked or suffix in ("g_idx", "weight_shape") or "quant_state" in suffix:
                filled[named] = (layer, suffix)
    _write(directory / "model.safetensors", names, filled, written)
    config = model_config(s) | ({"quantization_config": quantisation} if quantisation else {})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def _write(
    path: Path, names: dict[str, tuple[str, tuple[int, ...]]], filled: dict[str, tuple[int, str]], written: Tensors
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in names.items():
        length = int(np.prod(shape, dtype=np.int64)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (layer, suffix) in filled.items():
            begin, after = header[name]["data_offsets"]
            file.seek(8 + len(encoded) + begin)
            file.write(written[suffix][2](np.random.default_rng([layer, len(suffix)]), after - begin))
        file.truncate(8 + len(encoded) + end)


def column_bytes(shape: Shape, layout: str, heads: int) -> int:
    """The least that the columns of so many heads take, scales not counted."""
    (dtype, of_tensor, _) = next(iter(v for k, v in FORMATS[layout][0](*shape.projection).items() if _is_weight(k)))
    whole = int(np.prod(of_tensor, dtype=np.int64)) * SIZES[dtype]
    return whole * heads // shape.heads


def _is_weight(suffix: str) -> bool:
    return suffix in ("weight", "qweight", "weight_packed")
