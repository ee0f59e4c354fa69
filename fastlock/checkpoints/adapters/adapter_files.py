"""What a relocked adapter's directory holds under which name, and an adapter's weights with tensors added to them.

A relocked adapter has the names that PEFT looks for. What it held in another form before is below `fastlock/original/`:
the config, and of the weights the header, as their data stays where it is and new tensors come after it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastlock.checkpoints.layout import ASIDE, bypass, is_private
from fastlock.checkpoints.tensor_index import INDEX, MAX_HEADER_BYTES, SINGLE, StoredTensor
from fastlock.dtypes import SAFETENSORS_NAMES
from fastlock.errors import FastlockError
from fastlock.locks.adapter_receipt import ADAPTER_RECEIPT
from fastlock.locks.receipt import raw_bytes
from fastlock.storage.files import File, Patches, json_object, with_patches
from fastlock.storage.places import as_place, below, file_at, files_in

SIDECAR = "fastlock.safetensors"
# The header that the adapter's weights had before.
ORIGINAL_HEADER = f"{ASIDE}{ADAPTER_WEIGHTS}.header"
ORIGINAL_CONFIG = ASIDE + ADAPTER_CONFIG
# The weights themselves, where more of them changed than can be put back from the header.
ORIGINAL_WEIGHTS = ASIDE + ADAPTER_WEIGHTS

_BLOCK_BYTES = 256 * 1024
_WEIGHTS_OF_MODELS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def holds_adapter_only(files: Mapping[str, Any]) -> bool:
    """Whether a directory holds an adapter, and no model that it could be on top of."""
    return ADAPTER_CONFIG in files and not any(name in files for name in _WEIGHTS_OF_MODELS)


def is_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether there is an adapter at a path or URL, and no model; False where nothing can be read."""
    place = as_place(directory)
    try:
        if file_at(below(place, ADAPTER_CONFIG)) is None:
            return False
        return holds_adapter_only(files_in(place))
    except FastlockError:
        return False


def needs_adapter_name(name: str) -> bool:
    """Whether fastlock needs a name in a relocked adapter's directory for a file of its own."""
    return name in (ADAPTER_RECEIPT, SIDECAR) or name.partition("/")[0] == "fastlock"


def adapter_placements(files: Mapping[str, File]) -> dict[str, str]:
    """The name of each file of an adapter in the relocked one's directory; what stays behind is left out.

    Signatures, and weights that could be loaded instead of the relocked ones, are set aside.
    """
    own = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    return {
        name: ASIDE + name if name not in own and (name.endswith(".sig") or bypass([name], own)) else name
        for name in files
        if not is_private(name)
    }


def header_of(file: File) -> bytes:
    """The header of a safetensors file, and the length before it, byte for byte; of a damaged one, what there is."""
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    return file.read(0, min(8 + min(length, MAX_HEADER_BYTES), file.size))


def data_of(file: File, start: int, end: int) -> Iterator[bytes]:
    """A range of a file, piece by piece."""
    for first in range(start, end, _BLOCK_BYTES):
        yield file.read(first, min(_BLOCK_BYTES, end - first))


class SplicedFile:
    """Bytes, then a range of a file, then further bytes: a `File` that was never written. Attributes: as of `File`."""

    shared = False

    def __init__(self, head: bytes, file: Any, start: int, end: int, tail: bytes = b"", patches: Patches = ()) -> None:
        """Its parts.

        Args:
            head, tail: the bytes before and after.
            file: the file.
            start, end: of the range in it.
            patches: offsets in the whole, and the bytes that it is to have there.
        """
        self._head, self._file, self._start, self._end, self._tail = head, file, start, end, tail
        self.patches = patches
        self.size = len(head) + end - start + len(tail)
        self.identity = (*file.identity, head, tail, start, end)

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        first, last = len(self._head), len(self._head) + self._end - self._start
        data = self._head[start : start + length]
        begin, end = max(start, first), min(start + length, last)
        if begin < end:
            data += self._file.read(self._start + begin - first, end - begin)
        if start + length > last:
            data += self._tail[max(0, start - last) : start + length - last]
        return with_patches(data, start, self.patches)

    def parts(self) -> Iterator[bytes]:
        """The whole, piece by piece."""
        yield from data_of(self, 0, self.size)

    def patched(self, patches: Patches) -> SplicedFile:
        """The same with other bytes at some offsets."""
        return SplicedFile(self._head, self._file, self._start, self._end, self._tail, (*self.patches, *patches))

    def check_unchanged(self) -> None:
        """Raise a DamagedError if the file is not what it was when it was first looked at."""
        self._file.check_unchanged()


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a file that is to be written.

    Attributes:
        size: how many bytes it has.
        read: gives them.
    """

    size: int
    read: Callable[[], bytes]


class JoinedFile:
    """Pieces one after the other: a `File` that was never written, made as it is read. Attributes: as of `File`."""

    patches: Patches = ()
    shared = False

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Its pieces, in order; each is read when it is needed, and not kept."""
        self._pieces = tuple(pieces)
        self.size = sum(piece.size for piece in self._pieces)
        self.identity = (id(self),)

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        data, begin = b"", 0
        for piece in self._pieces:
            first, last = max(start, begin), min(start + length, begin + piece.size)
            if first < last:
                data += piece.read()[first - begin : last - begin]
            begin += piece.size
        return data

    def parts(self) -> Iterator[bytes]:
        """The whole, piece by piece."""
        for piece in self._pieces:
            yield piece.read()

    def check_unchanged(self) -> None:
        """Does nothing: who made the pieces knows what they are made of."""


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor that is to be written.

    Attributes:
        dtype, shape: its own.
        make: makes it, contiguous and on the CPU: each time the same.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def joined_tensors(file: Any, tensors: Mapping[str, StoredTensor | NewTensor]) -> JoinedFile:
    """A safetensors file of some tensors of another one, and of new ones: one at a time is in memory.

    Args:
        file: the one whose tensors some of these are.
        tensors: by key; they need not be in any order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces, end = list[Piece](), 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -_alignment(item[1])):
        piece = _piece_of(file, tensor)
        name = tensor.dtype if isinstance(tensor, StoredTensor) else SAFETENSORS_NAMES[tensor.dtype]
        start, end = end, end + piece.size
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        pieces.append(piece)
    head = _encoded(header)
    return JoinedFile([Piece(len(head), lambda: head), *pieces])


def _alignment(tensor: StoredTensor | NewTensor) -> int:
    """How many bytes a number has: where the larger ones come first, each begins where its like may lie in memory."""
    numbers = math.prod(tensor.shape)
    if isinstance(tensor, StoredTensor):
        return tensor.length // numbers if numbers else 0
    return tensor.dtype.itemsize


def _piece_of(file: Any, tensor: StoredTensor | NewTensor) -> Piece:
    if isinstance(tensor, StoredTensor):
        return Piece(tensor.length, lambda: file.read(tensor.start, tensor.length))
    return Piece(math.prod(tensor.shape) * tensor.dtype.itemsize, lambda: raw_bytes(tensor.make()))


def _encoded(header: dict[str, Any]) -> bytes:
    """The header of a safetensors file, and its length before it."""
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def with_tensors(file: Any, changed: Mapping[int, torch.Tensor], added: Mapping[str, torch.Tensor]) -> SplicedFile:
    """An adapter's weights with other numbers in some tensors, and with more tensors after them.

    Args:
        file: the weights, whose header was checked.
        changed: other numbers of tensors that are there, by their offset in the file.
        added: new tensors, by key.
    """
    before = header_of(file)
    header = json.loads(before[8:])
    end = file.size - len(before)
    for key, tensor in added.items():
        start, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = _encoded(header)
    patched = file.patched([(start, raw_bytes(tensor)) for start, tensor in changed.items()])
    return SplicedFile(head, patched, len(before), file.size, b"".join(map(raw_bytes, added.values())))


def without_tensors(file: Any, header: bytes, patches: Patches) -> SplicedFile:
    """The way back of `with_tensors`.

    Args:
        file: the weights with tensors added.
        header: the one that they had before.
        patches: offsets in what they were before, and the bytes that they had there.

    Raises:
        ValueError: they cannot have had this header.
    """
    offsets = [entry["data_offsets"][1] for key, entry in json_object(header[8:]).items() if key != "__metadata__"]
    start = len(header_of(file))
    end = start + max(offsets, default=0)
    if end > file.size:
        raise ValueError(f"data of {end - start} bytes, and there are {file.size - start}")
    return SplicedFile(header, file, start, end, patches=patches)
