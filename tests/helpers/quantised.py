"""Projections in every quantised format: by the format's own library, or packed number by number from its description.

Each writer returns the tensors of one projection by suffix, the `quantization_config`, and W in float64.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

Written = tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]


def _words(numbers: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of unsigned numbers, the first in the lowest bits."""
    per_word = 32 // bits
    words = []
    for at in range(0, len(numbers), per_word):
        word = sum(number << (bits * place) for place, number in enumerate(numbers[at : at + per_word]))
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


def gptq(
    hidden: int,
    width: int,
    *,
    bits: int = 4,
    group: int = 32,
    act_order: bool = False,
    version: int = 1,
    symmetric: bool = False,
    seed: int = 0,
) -> Written:
    """Number by number, as GPTQModel's format says; if symmetric, all zero points are in the middle."""
    rng = np.random.default_rng(seed)
    groups, largest = width // group, (1 << bits) - 1
    q = rng.integers(0, largest + 1, (width, hidden))
    z = rng.integers(version == 1, largest + 1, (groups, hidden))
    if symmetric:
        z[:] = 1 << (bits - 1)
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (groups, hidden))).half()
    of_input = np.arange(width) // group
    if act_order:
        of_input = rng.permutation(of_input)
    weight = torch.zeros(hidden, width, dtype=torch.float64)
    for i in range(width):
        for o in range(hidden):
            g = int(of_input[i])
            weight[o, i] = (int(q[i, o]) - int(z[g, o])) * float(scales[g, o])
    tensors = {
        "qweight": torch.tensor([_words(q[:, o].tolist(), bits) for o in range(hidden)], dtype=torch.int32).t(),
        "qzeros": torch.tensor([_words((z[g] - (version == 1)).tolist(), bits) for g in range(groups)]).int(),
        "scales": scales,
        "g_idx": torch.from_numpy(of_input).int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return tensors, config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}), weight


def awq(hidden: int, width: int, *, group: int = 32, seed: int = 0) -> Written:
    """Number by number, as AutoAWQ's "gemm" version packs: nibbles 0 to 7 of a word are columns 0 2 4 6 1 3 5 7."""
    rng = np.random.default_rng(seed)
    q, z = rng.integers(0, 16, (width, hidden)), rng.integers(0, 16, (width // group, hidden))
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (width // group, hidden))).half()
    weight = torch.zeros(hidden, width, dtype=torch.float64)
    for i in range(width):
        for o in range(hidden):
            weight[o, i] = (int(q[i, o]) - int(z[i // group, o])) * float(scales[i // group, o])

    def packed(matrix: np.ndarray) -> torch.Tensor:
        rows = []
        for row in matrix.tolist():
            shuffled: list[int] = []
            for at in range(0, len(row), 8):
                shuffled += [row[at + column] for column in (0, 2, 4, 6, 1, 3, 5, 7)]
            rows.append(_words(shuffled, 4))
        return torch.tensor(rows, dtype=torch.int32)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return {"qweight": packed(q), "qzeros": packed(z), "scales": scales}, config, weight


def block_fp8(hidden: int, width: int, *, block: tuple[int, int] = (128, 128), seed: int = 0) -> Written:
    """DeepSeek's: the last blocks may be cut off."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden, width, generator=generator).to(torch.float8_e4m3fn)
    shape = (-(-hidden // block[0]), -(-width // block[1]))
    scale = torch.rand(shape, generator=generator) + 0.5
    dense = torch.zeros(hidden, width, dtype=torch.float64)
    for row in range(hidden):
        for column in range(width):
            dense[row, column] = float(weight[row, column]) * float(scale[row // block[0], column // block[1]])
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    return {"weight": weight, "weight_scale_inv": scale}, config, dense


def modelopt_nvfp4(hidden: int, width: int, *, seed: int = 0) -> Written:
    """ModelOpt's: the matrix's scale multiplies, where compressed-tensors divides by its own."""
    generator = torch.Generator().manual_seed(seed)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.randint(0, 16, (hidden, width), generator=generator)
    scales = (torch.rand(hidden, width // 16, generator=generator) * 4).to(torch.float8_e4m3fn)
    overall = 0.37
    dense = torch.zeros(hidden, width, dtype=torch.float64)
    packed = torch.zeros(hidden, width // 2, dtype=torch.uint8)
    for row in range(hidden):
        for column in range(width):
            code = int(codes[row, column])
            value = values[code % 8] * (-1 if code >= 8 else 1)
            dense[row, column] = value * float(scales[row, column // 16]) * float(torch.tensor(overall))
            packed[row, column // 2] += code << (4 * (column % 2))
    tensors = {"weight": packed, "weight_scale": scales, "weight_scale_2": torch.tensor(overall)}
    return tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, dense


def compressed(hidden: int, width: int, layout: str, *, seed: int = 0, **arguments: Any) -> Written:
    """By the library compressed-tensors, and dequantised by it.

    Args:
        hidden, width: of W.
        layout: the library's name of the format.
        arguments: of its QuantizationArgs.
        seed: of the numbers.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(seed)
    weight = torch.randn(hidden, width)
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    extra = {}
    if layout == "nvfp4-pack-quantized":
        extra["global_scale"] = torch.tensor([6.0 * 448.0 / float(weight.abs().max())])
    grouped = _grouped(weight, weights)
    scale, zero = calculate_qparams(grouped.amin(dim=-1), grouped.amax(dim=-1), weights, **extra)
    state = {"weight": weight, "weight_scale": scale.reshape(_scale_shape(scale, weights))}
    if not weights.symmetric:
        state["weight_zero_point"] = zero.reshape(state["weight_scale"].shape)
    if extra:
        state["weight_global_scale"] = extra["global_scale"]
    if arguments.get("actorder"):
        state["weight_g_idx"] = (torch.randperm(width) // arguments["group_size"]).int()
    compressor = BaseCompressor.get_value_from_registry(layout)
    tensors = compressor.compress(state, scheme)
    dense = compressor.decompress(tensors, scheme)["weight"].double()
    groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(weights.model_dump_json())}}
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, config, dense


def _grouped(weight: torch.Tensor, weights: Any) -> torch.Tensor:
    if weights.strategy == "tensor":
        return weight.reshape(1, -1)
    if weights.group_size and weights.group_size > 0:
        return weight.reshape(len(weight), -1, weights.group_size)
    return weight


def _scale_shape(scale: torch.Tensor, weights: Any) -> tuple[int, ...]:
    strategy = weights.strategy
    return (1,) if strategy == "tensor" else (len(scale), 1) if strategy == "channel" else tuple(scale.shape)


def bits_and_bytes(
    hidden: int,
    width: int,
    *,
    kind: str = "nf4",
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Written:
    """By the library bitsandbytes, on the CPU, and dequantised by it."""
    from bitsandbytes import functional

    weight = torch.randn(hidden, width, generator=torch.Generator().manual_seed(seed))
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, quant_storage=storage)
    dense = functional.dequantize_4bit(packed, state).double()
    tensors = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, dense


def llm_int8(hidden: int, width: int, *, seed: int = 0) -> Written:
    """By the library bitsandbytes, and dequantised by it."""
    from bitsandbytes import functional

    weight = torch.randn(hidden, width, generator=torch.Generator().manual_seed(seed)).half()
    rows, statistics, _ = functional.int8_vectorwise_quant(weight)
    dense = functional.int8_vectorwise_dequant(rows, statistics).double()
    tensors = {"weight": rows, "SCB": statistics, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, dense
