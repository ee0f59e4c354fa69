"""The tensors of one quantised projection, read in pieces; and what every format can say of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import DamagedError, shown
from fastlock.storage.files import DOWNLOAD_AGAIN

# What torch calls the dtypes that quantised projections are made of.
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,  # the exponent alone: see `microscaled`
}

# A matrix of which some columns are wanted is mapped in blocks of this size.
_BLOCK_BYTES = 32 * 1024 * 1024

# Some columns of W as they are served, in the rows that are asked for: [rows, count] float64 on the CPU, new each time.
Dequantised = Callable[[slice], torch.Tensor]


class Quantised(Protocol):
    """One quantised output projection W, [hidden, width]. Each format is a file beside this one."""

    def columns(self, first: int, count: int) -> Dequantised:
        """Read columns [first, first + count) of W, at least one."""


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says beside the tensors of a projection.

    Attributes:
        where: the checkpoint, for messages.
        hidden, width: W is [hidden, width].
        config: the `quantization_config` of config.json; empty where there is none.
    """

    where: str
    hidden: int
    width: int
    config: Mapping[str, Any]


class SiteTensors:
    """The tensors of one projection, by what follows its name: "qweight", "weight_scale".

    Attributes:
        name: the projection's.
        where: the checkpoint, for messages.
    """

    def __init__(self, files: Mapping[str, Any], tensors: Mapping[str, StoredTensor], name: str, where: str) -> None:
        """Args: `files` and `tensors` of the whole checkpoint, by name; `name`: the projection's; `where`."""
        self._files, self._tensors = files, tensors
        self.name, self.where = name, where
        self._digest = hashlib.sha256()
        self._whole: dict[str, torch.Tensor] = {}

    def __contains__(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self._tensors

    def has(self, *suffixes: str) -> bool:
        """Whether all of these are there."""
        return all(suffix in self for suffix in suffixes)

    def get(self, suffix: str) -> StoredTensor:
        """Where a tensor is.

        Raises:
            DamagedError: there is none.
        """
        tensor = self._tensors.get(f"{self.name}.{suffix}")
        if tensor is None:
            raise self.damaged(f"lacks its {suffix}")
        return tensor

    def dtype(self, suffix: str) -> str | None:
        """What safetensors calls the tensor's dtype; None if it is not there."""
        return self.get(suffix).dtype if suffix in self else None

    def shape(self, suffix: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.get(suffix).shape

    def check(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raise a DamagedError if the tensor is not of one of these dtypes and shapes."""
        tensor = self.get(suffix)
        if tensor.dtype not in dtypes or tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.damaged(
                f"{suffix} is {tensor.dtype} {list(tensor.shape)}, but should be {' or '.join(dtypes)} {wanted}"
            )

    def damaged(self, what: str) -> DamagedError:
        """The error that says what is wrong with this projection."""
        return DamagedError(f"{self.where}: {shown(self.name)}: {what}. {DOWNLOAD_AGAIN}")

    def whole(self, suffix: str) -> torch.Tensor:
        """The whole tensor, which is read once."""
        if suffix not in self._whole:
            tensor = self.get(suffix)
            numbers = self._read(tensor, tensor.start, tensor.length).view(_DTYPES[tensor.dtype])
            self._whole[suffix] = numbers.reshape(tensor.shape)
        return self._whole[suffix]

    def rows(self, suffix: str, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count) of a matrix: one read."""
        tensor = self.get(suffix)
        row = tensor.length // tensor.shape[0]
        part = self._read(tensor, tensor.start + first * row, count * row)
        return part.view(_DTYPES[tensor.dtype]).reshape(count, *tensor.shape[1:])

    def part(self, suffix: str, first: int, count: int) -> torch.Tensor:
        """Columns [first, first + count) of a matrix: every row is passed, and these columns are kept."""
        tensor = self.get(suffix)
        rows, columns = tensor.shape
        item = tensor.length // (rows * columns)
        return self.part_of_rows(suffix, rows, first * item, count * item).view(_DTYPES[tensor.dtype])

    def part_of_rows(self, suffix: str, rows: int, first: int, count: int) -> torch.Tensor:
        """Bytes [first, first + count) of every row of a tensor, whatever its dtype and shape: [rows, count] uint8."""
        tensor = self.get(suffix)
        row = tensor.length // rows
        part = np.empty((rows, count), np.uint8)
        block = max(1, _BLOCK_BYTES // row)
        for top in range(0, rows, block):
            height = min(block, rows - top)
            with self._files[tensor.file].view(tensor.start + top * row, height * row) as view:
                stored = np.frombuffer(view, np.uint8).reshape(height, row)
                part[top : top + height] = stored[:, first : first + count]
                del stored
        self._digest.update(part.data)
        return torch.from_numpy(part)

    def raw(self, suffix: str) -> bytes:
        """The bytes of the whole tensor, whatever its dtype is."""
        tensor = self.get(suffix)
        return bytes(self._read(tensor, tensor.start, tensor.length).tolist())

    def digest(self) -> bytes:
        """SHA-256 of all bytes that were read so far, in the order in which they were read."""
        return self._digest.digest()

    def _read(self, tensor: StoredTensor, start: int, length: int) -> torch.Tensor:
        data = bytearray(self._files[tensor.file].read(start, length))
        self._digest.update(data)
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def groups_of_inputs(
    tensors: SiteTensors, index: str, groups: int, width: int, unused: int | None = None
) -> torch.Tensor:
    """The group of each input, which shares a scale, [width] int64: as the tensor `index` says, else in order.

    Args:
        tensors: of the projection.
        index: the name of the tensor.
        groups: how many there are.
        width: how many inputs.
        unused: what fills that tensor where it is to be ignored; None: it never is.

    Raises:
        DamagedError: there are no groups, they do not divide the inputs, or the tensor names others.
    """
    if groups < 1:
        raise tensors.damaged("has no groups")
    if index in tensors:
        tensors.check(index, ("I32",), (width,))
        group = tensors.whole(index).long()
        if unused is None or bool((group != unused).any()):
            if not 0 <= int(group.min()) <= int(group.max()) < groups:
                raise tensors.damaged(f"{index} names groups that are not there: there are {groups}")
            return group
    if width % groups:
        raise tensors.damaged(f"{groups} groups do not divide {width} inputs")
    return torch.arange(width) // (width // groups)


def pairs(values: Sequence[float], upper_first: bool = False) -> npt.NDArray[np.complex128]:
    """What the two halves of each byte stand for, side by side as one number: a table for `paired`, [256].

    Args:
        values: of the 16 codes.
        upper_first: whether the upper half of a byte comes first.
    """
    table = np.array(values, np.float64)
    lower, upper = np.tile(table, 16), np.repeat(table, 16)
    both = np.stack((upper, lower) if upper_first else (lower, upper), axis=1)
    return both.view(np.complex128).reshape(256)


def paired(packed: torch.Tensor, table: npt.NDArray[np.complex128]) -> torch.Tensor:
    """What the two halves of each byte stand for, side by side: both are looked up at once.

    Args:
        packed: [rows, n] uint8.
        table: of `pairs`.

    Returns:
        [rows, 2 n] float64.
    """
    return torch.from_numpy(np.take(table, packed.numpy()).view(np.float64))


def in_runs(group: torch.Tensor) -> torch.Tensor:
    """The groups of some columns, one after the other: each once if all have the same number of columns side by side.

    Args:
        group: that of each column, [count] int64; at least one.

    Returns:
        [runs] int64: each is the group of the next count / runs columns.
    """
    groups, sizes = group.unique_consecutive(return_counts=True)
    return groups if bool((sizes == sizes[0]).all()) else group


def scaled(numbers: Dequantised, zeros: torch.Tensor | None, scales: torch.Tensor) -> Dequantised:
    """(q - z) * scale, of columns in runs of one length each.

    Args:
        numbers: q.
        zeros: z of each run, [hidden, runs] float64; None: 0.
        scales: likewise.
    """

    def in_rows(rows: slice) -> torch.Tensor:
        q = numbers(rows)
        runs = q.view(len(q), scales.shape[1], -1)
        if zeros is not None:
            runs.sub_(zeros[rows, :, None])
        runs.mul_(scales[rows, :, None])
        return q

    return in_rows


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers of `bits` bits that integers hold, the lowest bits first, side by side.

    Args:
        words: [..., n] of an integer dtype.
        bits: a divisor of the words' bits.

    Returns:
        [..., n * bits of a word // bits] int32.
    """
    shifts = torch.arange(0, words.element_size() * 8, bits, dtype=torch.int32)
    return ((words.to(torch.int32).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
