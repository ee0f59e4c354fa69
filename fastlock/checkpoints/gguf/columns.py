"""The locked columns of a projection in a GGUF, dequantised: of each row, the blocks that cover them, and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastlock.checkpoints.gguf.header import GgufTensor
from fastlock.checkpoints.gguf.parts import GgufPart
from fastlock.checkpoints.gguf.tensor_types import TensorType
from fastlock.errors import FastlockError, UnsupportedError, shown

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float32]

# Rows are mapped in blocks of so many bytes, and dequantised so many numbers at a time: the library takes some twenty
# times the memory of the numbers.
_MAPPED_BYTES = 32 * 2**20
_NUMBERS = 2**19


def read_columns(part: GgufPart, weight: GgufTensor, heads: Sequence[int], head_dim: int) -> tuple[Numbers, bytes]:
    """The columns of some heads.

    Args:
        part: the file.
        weight: W, whose shape is (num_heads * head_dim, hidden), of a type that `check_type` lets pass.
        heads: ascending.
        head_dim: how many columns a head has.

    Returns:
        The columns side by side, [hidden, len(heads) * head_dim] float32: of F32, F16, BF16, Q4_0, Q5_0 and Q8_0 these
        are the numbers of the file, of all others those numbers rounded to float32, as llama.cpp's own dequantisation
        gives them; and the SHA-256 of the blocks read, row by row.
    """
    width, hidden = weight.shape
    of_type = weight.type
    row = width // of_type.block * of_type.block_bytes
    runs = _runs(heads, head_dim, of_type.block)
    taken = sum(last - first for first, last in runs)
    wanted = _wanted(heads, head_dim, of_type.block, runs)
    columns = np.empty((hidden, len(heads) * head_dim), np.float32)
    sha = hashlib.sha256()
    height = max(1, min(_MAPPED_BYTES // row, _NUMBERS // (taken * of_type.block)))
    for top in range(0, hidden, height):
        count = min(height, hidden - top)
        with part.file.view(part.data_at + weight.offset + top * row, count * row) as view:
            stored = np.frombuffer(view, np.uint8).reshape(count, row)
            blocks = np.concatenate(
                [stored[:, first * of_type.block_bytes : last * of_type.block_bytes] for first, last in runs], axis=1
            )
            del stored
        sha.update(blocks.data)
        columns[top : top + count] = _dequantised(blocks, of_type)[:, wanted]
    return columns, sha.digest()


def check_type(name: str, of_type: TensorType, where: str) -> None:
    """Raise if numbers of this type cannot be read.

    Raises:
        UnsupportedError: neither fastlock nor the package gguf reads it.
        FastlockError: that package is not installed.
    """
    try:
        with np.errstate(all="ignore"):
            _dequantised(np.zeros((1, of_type.block_bytes), np.uint8), of_type)
    except ImportError:
        raise FastlockError(
            f"{where}: {shown(name)} is {of_type.name}, which the package gguf dequantises, and it is not installed. "
            "Install fastlock[gguf]."
        ) from None
    except (NotImplementedError, ValueError):
        raise UnsupportedError(
            f"{where}: {shown(name)} is {of_type.name}, which the package gguf does not dequantise. Quantise the model "
            "again, to another type."
        ) from None


def _runs(heads: Sequence[int], head_dim: int, block: int) -> list[tuple[int, int]]:
    """The blocks of a row that cover these heads, as ranges that do not touch."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        first, last = head * head_dim // block, -(-(head + 1) * head_dim // block)
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return runs


def _wanted(heads: Sequence[int], head_dim: int, block: int, runs: list[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """Where in the numbers of these blocks the columns of the heads are."""
    columns = np.concatenate([np.arange(first * block, last * block) for first, last in runs])
    locked = np.concatenate([np.arange(head * head_dim, (head + 1) * head_dim) for head in heads])
    wanted: npt.NDArray[np.intp] = np.searchsorted(columns, locked)
    return wanted


def _dequantised(blocks: Bytes, of_type: TensorType) -> Numbers:
    """The numbers of whole blocks, [rows, numbers] float32.

    Raises:
        NotImplementedError, ValueError: nobody reads this type.
        ImportError: the package gguf is not installed.
    """
    if of_type.name == "F32":
        return blocks.view("<f4")
    if of_type.name == "F16":
        return blocks.view("<f2").astype(np.float32)
    if of_type.name == "BF16":
        return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # weights that are not finite are found by their fold
        numbers: Numbers = dequantize(blocks.reshape(1, -1), GGMLQuantizationType(of_type.number))
    return numbers.reshape(len(blocks), -1)
