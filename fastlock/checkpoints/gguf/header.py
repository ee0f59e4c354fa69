"""The header of a GGUF: what is said of the model, and where its tensors lie. It may be hostile.

The format is described in ggml's docs/gguf.md; what is refused beyond that, llama.cpp's own reader (gguf.cpp) refuses
as well. Of metadata only the places are kept: values are read when they are asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from fastlock.checkpoints.gguf.byte_reader import ByteReader
from fastlock.checkpoints.gguf.tensor_types import TENSOR_TYPES, TensorType
from fastlock.errors import DamagedError, FastlockError, UnsupportedError, shown
from fastlock.storage.files import DOWNLOAD_AGAIN, File

MAGIC = b"GGUF"
VERSIONS = (2, 3)
UINT32, INT32, STRING, ARRAY = 4, 5, 8, 9
# What a value of each kind looks like.
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _CODES.items()}
_WHOLE_NUMBERS = {0, 1, 2, 3, 4, 5, 10, 11}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_ARRAY = struct.Struct("<IQ")
_PREAMBLE = struct.Struct("<IQQ")
_TENSOR_END = struct.Struct("<IQ")
PREAMBLE_LENGTH = len(MAGIC) + _PREAMBLE.size
# Larger ones no model has; llama.cpp keeps tensor names in 64 bytes.
_MAX_ENTRIES, _MAX_TENSORS, _MAX_KEY, _MAX_NAME, _MAX_DIMS = 2**16, 2**16, 2**16 - 1, 63, 4
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 2**16


@dataclass(frozen=True)
class MetadataEntry:
    """One value of the metadata.

    Attributes:
        key: its name.
        kind: of the value, or of those in the array.
        count: how many there are in the array; None if it is a single value.
        start: where in the header its key begins.
        at: where the value does, in an array the first.
    """

    key: str
    kind: int
    count: int | None
    start: int
    at: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor.

    Attributes:
        name: its name.
        shape: the length of its rows comes first: W [out, in] has (in, out).
        type: of its numbers.
        start: where in the header it is described.
        offset: where its data begins, from the beginning of all data.
        length: how many bytes of data it has.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class GgufHeader:
    """A header.

    Attributes:
        raw: its bytes, without the padding that follows.
        entries: the metadata by key, in order.
        tensors: by name, in order; their data lies in this order, without gaps but for padding.
        entries_end: where in it the metadata ends.
        alignment: the data of each tensor begins at a multiple of it.
        where: the file, for messages.
    """

    raw: bytes
    entries: Mapping[str, MetadataEntry]
    tensors: Mapping[str, GgufTensor]
    entries_end: int
    alignment: int
    where: str

    @property
    def data_start(self) -> int:
        """Where in the file the data begins."""
        return aligned(len(self.raw), self.alignment)

    @property
    def data_end(self) -> int:
        """Where the data of the last tensor ends, from the beginning of all data."""
        last = next(reversed(list(self.tensors.values())), None)
        return 0 if last is None else last.offset + last.length

    def text(self, key: str) -> str | None:
        """A value that is text, None where there is none of this name.

        Raises:
            DamagedError: it is something else.
        """
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.kind != STRING or entry.count is not None:
            raise self._not_a("text", key)
        (length,) = _U64.unpack_from(self.raw, entry.at)
        try:
            return self.raw[entry.at + _U64.size :][:length].decode()
        except UnicodeDecodeError:
            raise self._not_a("text", key) from None

    def number(self, key: str) -> int | None:
        """A whole number, None where there is none of this name; of an array the one that all its entries are.

        Raises:
            UnsupportedError: it is an array of different numbers.
            DamagedError: it is something else.
        """
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.kind not in _WHOLE_NUMBERS or entry.count == 0:
            raise self._not_a("a whole number", key)
        layout, count = _SCALARS[entry.kind], 1 if entry.count is None else entry.count
        first = self.raw[entry.at : entry.at + layout.size]
        if self.raw[entry.at : entry.at + count * layout.size] != count * first:
            raise UnsupportedError(
                f"{self.where}: its layers have different {shown(key)}. fastlock relocks models in which all layers "
                "are alike."
            )
        number: int = layout.unpack(first)[0]
        return number

    def _not_a(self, what: str, key: str) -> DamagedError:
        return DamagedError(f"{self.where}: {shown(key)} is not {what}. {DOWNLOAD_AGAIN}")


def read_header(file: File, where: str) -> GgufHeader:
    """Read the header of a GGUF.

    Args:
        file: the file; of its data no byte is read.
        where: the file, for messages.

    Raises:
        UnsupportedError: it is of another version, or of a big-endian machine.
        DamagedError: it is damaged or hostile, or is cut short.
        FastlockError: it is no GGUF.
    """
    reader = ByteReader(file, where)
    tensor_count, entry_count = _read_preamble(reader, file, where)
    try:
        entries = _read_entries(reader, entry_count, where)
        entries_end = reader.at
        alignment = _alignment(reader, entries, where)
        tensors = _read_tensors(reader, tensor_count, alignment, where)
    except UnicodeDecodeError:
        raise _damaged(where, "a name in its header is not text") from None
    header = GgufHeader(reader.passed(), entries, tensors, entries_end, alignment, where)
    if tensors and header.data_start + header.data_end > file.size:
        raise _damaged(
            where, f"ends after {file.size} bytes, and its tensors after {header.data_start + header.data_end}"
        )
    return header


def aligned(position: int, alignment: int) -> int:
    """The first multiple of the alignment from there on."""
    return -(-position // alignment) * alignment


def encoded_text(key: str, text: str) -> bytes:
    """A text with its key, as metadata holds it."""
    return _string(key) + _U32.pack(STRING) + _string(text)


def encoded_tensor(name: str, shape: tuple[int, ...], tensor_type: TensorType, offset: int) -> bytes:
    """The description of a tensor, as a header holds it."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + dims + _TENSOR_END.pack(tensor_type.number, offset)


def encoded_counts(header: GgufHeader, tensors: int, entries: int) -> bytes:
    """How a header begins, up to its metadata, with these counts."""
    (version,) = _U32.unpack_from(header.raw, len(MAGIC))
    return MAGIC + _PREAMBLE.pack(version, tensors, entries)


def encoded_number(entry: MetadataEntry, number: int) -> bytes:
    """A whole number in place of that of an entry."""
    return _SCALARS[entry.kind].pack(number)


def _string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _read_preamble(reader: ByteReader, file: File, where: str) -> tuple[int, int]:
    """How many tensors and entries there are said to be."""
    if file.size < len(MAGIC) or reader.raw(len(MAGIC)) != MAGIC:
        raise FastlockError(f"{where}: is not a GGUF file, which begins with {MAGIC.decode()}. Give a GGUF file.")
    (version,) = reader.numbers(_U32)
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{where}: was written for big-endian machines. Convert the model again, for this one.")
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{where}: GGUF version {version}; fastlock reads {' and '.join(map(str, VERSIONS))}. Convert the model "
            "again with a current llama.cpp."
        )
    tensors, entries = reader.numbers(struct.Struct("<QQ"))
    if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
        raise _damaged(where, f"says that it has {tensors} tensors and {entries} entries of metadata")
    return tensors, entries


def _read_entries(reader: ByteReader, count: int, where: str) -> dict[str, MetadataEntry]:
    entries: dict[str, MetadataEntry] = {}
    for _ in range(count):
        start = reader.at
        key = _read_name(reader, _MAX_KEY, where)
        if key in entries:
            raise _damaged(where, f"gives {shown(key[:80])} twice")
        (kind,) = reader.numbers(_U32)
        length: int | None = None
        if kind == ARRAY:
            kind, length = reader.numbers(_ARRAY)
        entries[key] = MetadataEntry(key, kind, length, start, reader.at)
        if kind == STRING:
            reader.skip_strings(1 if length is None else length, _U64)
        elif kind in _SCALARS:
            reader.skip((1 if length is None else length) * _SCALARS[kind].size)
        else:
            what = "an array of arrays" if kind == ARRAY else f"of kind {kind}"
            raise _damaged(where, f"{shown(key[:80])} is {what}, which GGUF readers do not know")
    return entries


def _alignment(reader: ByteReader, entries: Mapping[str, MetadataEntry], where: str) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return _DEFAULT_ALIGNMENT
    number: int = 0
    if entry.kind == UINT32 and entry.count is None:
        (number,) = _U32.unpack_from(reader.passed(), entry.at)
    if not 0 < number <= _MAX_ALIGNMENT or number & (number - 1):
        raise _damaged(where, f"its general.alignment is {number}, and should be a power of two up to {_MAX_ALIGNMENT}")
    return number


def _read_tensors(reader: ByteReader, count: int, alignment: int, where: str) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for _ in range(count):
        tensor = _read_tensor(reader, where)
        if tensor.name in tensors:
            raise _damaged(where, f"holds the tensor {shown(tensor.name)} twice")
        if tensor.offset != expected:
            raise _damaged(
                where,
                f"the data of {shown(tensor.name)} begins at {tensor.offset}, and that of the tensor before it ends at "
                f"{expected}",
            )
        expected = aligned(expected + tensor.length, alignment)
        tensors[tensor.name] = tensor
    return tensors


def _read_tensor(reader: ByteReader, where: str) -> GgufTensor:
    start = reader.at
    name = _read_name(reader, _MAX_NAME, where)
    (dims,) = reader.numbers(_U32)
    if not 1 <= dims <= _MAX_DIMS:
        raise _damaged(where, f"{shown(name)} has {dims} dimensions")
    shape = reader.numbers(struct.Struct(f"<{dims}Q"))
    number, offset = reader.numbers(_TENSOR_END)
    tensor_type = TENSOR_TYPES.get(number)
    if tensor_type is None:
        raise UnsupportedError(
            f"{where}: {shown(name)} is of type {number}, which fastlock does not know. Quantise the model again, to "
            "another type."
        )
    numbers = math.prod(shape)
    if not 0 < numbers < 2**63 or shape[0] % tensor_type.block:
        raise _damaged(where, f"{shown(name)} has the shape {list(shape)}, which cannot be in {tensor_type.name}")
    length = numbers // tensor_type.block * tensor_type.block_bytes
    return GgufTensor(name, shape, tensor_type, start, offset, length)


def _read_name(reader: ByteReader, limit: int, where: str) -> str:
    (length,) = reader.numbers(_U64)
    if not 0 < length <= limit:
        raise _damaged(where, f"a name in its header has {length} bytes")
    return reader.raw(length).decode()


def _damaged(where: str, what: str) -> DamagedError:
    return DamagedError(f"{where}: {what}. {DOWNLOAD_AGAIN}")
