"""Every type of tensors: columns as llama.cpp's formulas give them, written out, or a refusal that names the type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import fastlock
from fastlock.checkpoints.gguf.columns import check_type, read_columns
from fastlock.checkpoints.gguf.header import GgufTensor
from fastlock.checkpoints.gguf.parts import GgufPart
from fastlock.checkpoints.gguf.tensor_types import TENSOR_TYPES, TensorType
from fastlock.storage.local import LocalFile

TYPES = {of_type.name: of_type for of_type in TENSOR_TYPES.values()}
REFUSED = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0", "Q2_0")
ROWS, WIDTH, HEADS, HEAD_DIM = 3, 1024, (1, 3, 4, 9), 64


def half(block: list[int], at: int) -> float:
    """A number of half precision."""
    return float(np.array(block[at : at + 2], np.uint8).view(np.float16)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def q4_0(block: list[int]) -> list[float]:
    d = half(block, 0)
    return [d * ((byte & 15) - 8) for byte in block[2:]] + [d * ((byte >> 4) - 8) for byte in block[2:]]


def q8_0(block: list[int]) -> list[float]:
    return [half(block, 0) * signed(byte) for byte in block[2:]]


def q4_k(block: list[int]) -> list[float]:
    d, least, packed, q = half(block, 0), half(block, 2), block[4:16], block[16:]
    found: list[float] = []
    for i in range(8):
        if i < 4:
            scale, low = packed[i] & 63, packed[i + 4] & 63
        else:
            scale = packed[i + 4] & 15 | packed[i - 4] >> 6 << 4
            low = packed[i + 4] >> 4 | packed[i] >> 6 << 4
        of_32 = q[32 * (i // 2) : 32 * (i // 2) + 32]
        found += [d * scale * (byte >> 4 if i % 2 else byte & 15) - least * low for byte in of_32]
    return found


def q6_k(block: list[int]) -> list[float]:
    d, scales = half(block, 208), [signed(byte) for byte in block[192:208]]
    found = [0.0] * 256
    for n in range(2):
        low, high, of_half = block[64 * n : 64 * n + 64], block[128 + 32 * n : 160 + 32 * n], scales[8 * n : 8 * n + 8]
        for l in range(32):  # noqa: E741 (as in ggml)
            for quarter in range(4):
                nibble = low[l + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
                q = (nibble | (high[l] >> 2 * quarter & 3) << 4) - 32
                found[128 * n + 32 * quarter + l] = d * of_half[2 * quarter + l // 16] * q
    return found


def tq1_0(block: list[int]) -> list[float]:
    d, q = half(block, 52), block[:52]

    def trits(of: list[int], count: int) -> list[float]:
        return [d * (((byte * 3**n & 255) * 3 >> 8) - 1) for n in range(count) for byte in of]

    return trits(q[:32], 5) + trits(q[32:48], 5) + trits(q[48:], 4)


def tq2_0(block: list[int]) -> list[float]:
    d = half(block, 64)
    halves = (block[:32], block[32:64])
    return [d * ((byte >> 2 * i & 3) - 1) for of_half in halves for i in range(4) for byte in of_half]


def iq1_m(block: list[int]) -> list[float]:
    q, high = block[:32], block[32:48]
    scales = [block[48 + 2 * i] | block[49 + 2 * i] << 8 for i in range(4)]
    bits = scales[0] >> 12 | scales[1] >> 8 & 0xF0 | scales[2] >> 4 & 0xF00 | scales[3] & 0xF000
    d = half([bits & 255, bits >> 8], 0)
    gguf.quants.IQ1_M.init_grid()
    grid = np.array(gguf.quants.IQ1_M.grid).reshape(2048, 8)  # the table alone
    found: list[float] = []
    for i in range(32):  # groups of 8 numbers
        of_two = high[i // 2] >> 4 * (i % 2)
        scale = 2 * (scales[i // 8] >> 3 * (i // 2 % 4) & 7) + 1
        delta = -0.125 if of_two & 8 else 0.125
        found += [d * scale * (float(number) + delta) for number in grid[q[i] | (of_two & 7) << 8]]
    return found


def nvfp4(block: list[int]) -> list[float]:
    codes = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    scales = torch.tensor(block[:4], dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
    found: list[float] = []
    for scale, i in zip(scales, range(4, 36, 8), strict=True):
        found += [scale * codes[byte & 15] for byte in block[i : i + 8]]
        found += [scale * codes[byte >> 4] for byte in block[i : i + 8]]
    return found


# With where in a block the upper byte of a number of half precision is, and its bits that are to be 0 to keep it small.
FORMULAS: dict[str, tuple[Callable[[list[int]], list[float]], dict[int, int]]] = {
    "Q4_0": (q4_0, {1: 0x40}),
    "Q8_0": (q8_0, {1: 0x40}),
    "Q4_K": (q4_k, {1: 0x40, 3: 0x40}),
    "Q6_K": (q6_k, {209: 0x40}),
    "TQ1_0": (tq1_0, {53: 0x40}),
    "TQ2_0": (tq2_0, {65: 0x40}),
    "IQ1_M": (iq1_m, {55: 0x40}),
    "NVFP4": (nvfp4, dict.fromkeys(range(4), 0x81)),
}


def columns_of(data: np.ndarray, of_type: TensorType, path: Path) -> tuple[Any, bytes]:
    """What fastlock reads of a file that holds one matrix."""
    path.write_bytes(data.tobytes())
    part: Any = GgufPart(path, LocalFile(path), None, b"", 0, data.nbytes)  # type: ignore[arg-type]
    return read_columns(part, GgufTensor("w", (WIDTH, ROWS), of_type, 0, 0, data.nbytes), HEADS, HEAD_DIM)


def random_bytes(of_type: TensorType) -> np.ndarray:
    rng = np.random.default_rng(of_type.number)
    return rng.integers(0, 256, (ROWS, WIDTH // of_type.block, of_type.block_bytes), dtype=np.uint8)


def locked(whole: np.ndarray) -> np.ndarray:
    return np.concatenate([whole[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in HEADS], axis=1)


@pytest.mark.parametrize("name", FORMULAS)
def test_columns_are_what_llama_cpp_computes(name: str, tmp_path: Path) -> None:
    formula, zeros = FORMULAS[name]
    data = random_bytes(TYPES[name])
    for place, mask in zeros.items():
        data[:, :, place] &= 255 - mask
    whole = np.array([[number for block in row for number in formula(block)] for row in data.tolist()])
    assert whole.shape == (ROWS, WIDTH)
    assert len(np.unique(whole)) > 20
    numbers, _ = columns_of(data, TYPES[name], tmp_path / "w")
    np.testing.assert_allclose(numbers, locked(whole), rtol=0, atol=2**-22 * np.abs(whole).max())


@pytest.mark.parametrize("name", [name for name in TYPES if name not in REFUSED])
def test_columns_are_those_of_the_whole_matrix(name: str, tmp_path: Path) -> None:
    """As the package dequantises it; NaN and infinities too."""
    data = random_bytes(TYPES[name])
    check_type("w", TYPES[name], "here")
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[name]
        whole = gguf.quants.dequantize(data.reshape(ROWS, -1), kind).reshape(ROWS, WIDTH).astype(np.float32)
    numbers, digest = columns_of(data, TYPES[name], tmp_path / "w")
    np.testing.assert_array_equal(numbers, locked(whole))
    block, covered = TYPES[name].block, np.zeros(WIDTH // TYPES[name].block, bool)
    for head in HEADS:
        covered[head * HEAD_DIM // block : -(-(head + 1) * HEAD_DIM // block)] = True
    assert digest == hashlib.sha256(data[:, covered].tobytes()).digest()


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_dequantises_is_refused_by_name(name: str) -> None:
    with pytest.raises(fastlock.UnsupportedError, match=f"w is {name}, which the package gguf does not dequantise"):
        check_type("w", TYPES[name], "here")
