"""Reading the header of a stranger's GGUF: what it says, and every way in which it can lie."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

import fastlock
from fastlock.checkpoints.gguf.byte_reader import MAX_HEADER_BYTES
from fastlock.checkpoints.gguf.header import GgufHeader, read_header
from fastlock.checkpoints.gguf.tensor_types import TENSOR_TYPES
from fastlock.storage.files import InMemoryFile
from tests.helpers.gguf_files import Kind, Tiny, lock_of


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    *parts: bytes,
    tensors: int = 0,
    entries: int = 0,
    version: int = 3,
    magic: bytes = b"GGUF",
    data: int = 4096,
    order: str = "<",
) -> bytes:
    """A header of these parts, aligned, and so many bytes of data."""
    found = magic + struct.pack(f"{order}IQQ", version, tensors, entries) + b"".join(parts)
    return found + bytes(-len(found) % 32) + bytes(data)


def read(data: bytes) -> GgufHeader:
    return read_header(InMemoryFile(data), "the file")


def test_the_package_s_own_reader_says_the_same(tmp_path: Path) -> None:
    path = Tiny(Kind.Q8_0, biased=(1,), metadata={"general.alignment": 64}).write(tmp_path / "m.gguf")
    data, theirs = path.read_bytes(), gguf.GGUFReader(path)
    ours = read(data)
    assert [one.name for one in theirs.tensors] == list(ours.tensors)
    for one in theirs.tensors:
        found = ours.tensors[one.name]
        assert found.shape == tuple(one.shape.tolist())
        assert (found.type.name, found.length) == (one.tensor_type.name, one.n_bytes)
        assert ours.data_start + found.offset == one.data_offset
    assert ours.alignment == theirs.alignment == 64
    assert list(ours.entries) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    for key in ("general.architecture", "general.name"):
        assert ours.text(key) == theirs.fields[key].contents()
    for key in ("llama.block_count", "llama.attention.head_count"):
        assert ours.number(key) == theirs.fields[key].contents()
    assert ours.text("there.is.none") is ours.number("there.is.none") is None
    assert ours.entries["tokenizer.ggml.tokens"].count == 128


def test_the_types_of_tensors_are_those_of_the_package() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: tuple(found)[1:] for number, found in TENSOR_TYPES.items()}
    assert {number: ours[number] for number in theirs} == theirs


@pytest.mark.parametrize(
    ("kind", "code"), [(0, "B"), (1, "b"), (2, "H"), (3, "h"), (4, "I"), (5, "i"), (10, "Q"), (11, "q")]
)
def test_whole_numbers_of_every_kind(kind: int, code: str) -> None:
    one = entry("n", kind, struct.pack(f"<{code}", 7))
    several = entry("m", 9, struct.pack(f"<IQ3{code}", kind, 3, 5, 5, 5))
    found = read(header(one, several, entries=2))
    assert (found.number("n"), found.number("m")) == (7, 5)


HOSTILE = {
    "magic": (header(magic=b"GGML"), fastlock.FastlockError, "is not a GGUF file"),
    "empty": (b"", fastlock.FastlockError, "is not a GGUF file"),
    "cut in the preamble": (header()[:20], fastlock.DamagedError, "ends before its header does"),
    "big endian": (header(order=">"), fastlock.UnsupportedError, "was written for big-endian machines"),
    "version 1": (header(version=1), fastlock.UnsupportedError, "GGUF version 1; fastlock reads 2 and 3"),
    "version 4": (header(version=4), fastlock.UnsupportedError, "GGUF version 4"),
    "many tensors": (header(tensors=2**63), fastlock.DamagedError, "says that it has 9223372036854775808 tensors"),
    "many entries": (header(entries=2**64 - 1), fastlock.DamagedError, "18446744073709551615 entries of metadata"),
    "more entries than there are": (header(entries=9), fastlock.DamagedError, "a name in its header has 0 bytes"),
    "long key": (header(struct.pack("<Q", 2**40), entries=1), fastlock.DamagedError, "has 1099511627776 bytes"),
    "key twice": (
        header(entry("a", 4, bytes(4)), entry("a", 4, bytes(4)), entries=2),
        fastlock.DamagedError,
        "gives a twice",
    ),
    "key not text": (header(text(b"\xff") + bytes(8), entries=1), fastlock.DamagedError, "is not text"),
    "kind": (header(entry("a", 13, bytes(8)), entries=1), fastlock.DamagedError, "a is of kind 13"),
    "long string": (
        header(entry("a", 8, struct.pack("<Q", 2**63)), entries=1),
        fastlock.DamagedError,
        "ends before its header does",
    ),
    "long array": (
        header(entry("a", 9, struct.pack("<IQ", 4, 2**62)), entries=1),
        fastlock.DamagedError,
        "ends before its header does",
    ),
    "long array of strings": (
        header(entry("a", 9, struct.pack("<IQ", 8, 2**61)), entries=1),
        fastlock.DamagedError,
        "ends before its header does",
    ),
    "string in an array": (
        header(entry("a", 9, struct.pack("<IQQQ", 8, 2, 0, 2**64 - 1)), entries=1),
        fastlock.DamagedError,
        "ends before its header does",
    ),
    "array of arrays": (
        header(entry("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0)), entries=1),
        fastlock.DamagedError,
        "a is an array of arrays",
    ),
    "alignment 0": (
        header(entry("general.alignment", 4, bytes(4)), entries=1),
        fastlock.DamagedError,
        "its general.alignment is 0, and should be a power of two",
    ),
    "alignment 48": (
        header(entry("general.alignment", 4, struct.pack("<I", 48)), entries=1),
        fastlock.DamagedError,
        "its general.alignment is 48",
    ),
    "alignment 2 GiB": (
        header(entry("general.alignment", 4, struct.pack("<I", 2**31)), entries=1),
        fastlock.DamagedError,
        "its general.alignment is 2147483648",
    ),
    "alignment as text": (
        header(entry("general.alignment", 8, text("32")), entries=1),
        fastlock.DamagedError,
        "should be a power of two",
    ),
    "tensor twice": (
        header(tensor("a"), tensor("a", offset=32), tensors=2),
        fastlock.DamagedError,
        "holds the tensor a twice",
    ),
    "long name": (header(tensor("n" * 64), tensors=1), fastlock.DamagedError, "a name in its header has 64 bytes"),
    "no dimension": (header(tensor(shape=()), tensors=1), fastlock.DamagedError, "t has 0 dimensions"),
    "many dimensions": (header(tensor(shape=(1,) * 5), tensors=1), fastlock.DamagedError, "t has 5 dimensions"),
    "billions of dimensions": (
        header(text("t") + struct.pack("<I", 2**32 - 1), tensors=1),
        fastlock.DamagedError,
        "t has 4294967295 dimensions",
    ),
    "a dimension of 0": (header(tensor(shape=(0, 4)), tensors=1), fastlock.DamagedError, r"has the shape \[0, 4\]"),
    "product beyond 64 bits": (
        header(tensor(shape=(2**32, 2**32)), tensors=1),
        fastlock.DamagedError,
        "which cannot be in F32",
    ),
    "half a block": (
        header(tensor(shape=(40, 4), kind=8), tensors=1),
        fastlock.DamagedError,
        "which cannot be in Q8_0",
    ),
    "type": (header(tensor(kind=4), tensors=1), fastlock.UnsupportedError, "t is of type 4, which fastlock does not"),
    "type beyond all": (header(tensor(kind=2**32 - 1), tensors=1), fastlock.UnsupportedError, "of type 4294967295"),
    "offset": (header(tensor(offset=64), tensors=1), fastlock.DamagedError, "t begins at 64, and that of the tensor"),
    "overlap": (
        header(tensor("a", (64,)), tensor("b", offset=32), tensors=2),
        fastlock.DamagedError,
        "b begins at 32, and that of the tensor before it ends at 256",
    ),
    "gap": (
        header(tensor("a"), tensor("b", offset=64), tensors=2),
        fastlock.DamagedError,
        "b begins at 64, and that of the tensor before it ends at 32",
    ),
    "beyond the end": (
        header(tensor(shape=(1025,)), tensors=1),
        fastlock.DamagedError,
        "ends after 4160 bytes, and its tensors after 4164",
    ),
    "far beyond the end": (header(tensor(shape=(2**60,)), tensors=1), fastlock.DamagedError, "ends after 4160 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies(name: str) -> None:
    data, kind, message = HOSTILE[name]
    with pytest.raises(fastlock.FastlockError, match=message) as error:
        read(data)
    assert type(error.value) is kind


def test_values_of_other_kinds_than_asked_for() -> None:
    parts = [
        entry("f", 6, struct.pack("<f", 1.0)),
        entry("t", 8, text(b"\xff\xfe")),
        entry("none", 9, struct.pack("<IQ", 4, 0)),
        entry("ts", 9, struct.pack("<IQ", 8, 1) + text("a")),
        entry("two", 9, struct.pack("<IQ2I", 4, 2, 5, 6)),
    ]
    found = read(header(*parts, entries=len(parts)))
    for key in ("f", "t", "none", "ts"):
        with pytest.raises(fastlock.DamagedError, match=f"{key} is not a whole number"):
            found.number(key)
    for key in ("f", "t", "ts"):
        with pytest.raises(fastlock.DamagedError, match=f"{key} is not text"):
            found.text(key)
    with pytest.raises(fastlock.UnsupportedError, match="its layers have different two"):
        found.number("two")


class Endless(InMemoryFile):
    """A file of so many bytes that begins like this, and goes on with zeros."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read(self, start: int, length: int) -> bytes:
        return self.data[start : start + length].ljust(length, b"\0")


@pytest.mark.parametrize(
    "value", [struct.pack("<IQ", 4, 2**40), struct.pack("<IQ", 8, 2**40), struct.pack("<IQQ", 8, 1, 2**40)]
)
def test_memory_is_bounded_whatever_the_counts_say(value: bytes) -> None:
    """Though the file has as many bytes as it says."""
    data = header(entry("a", 9, value), entries=1)
    tracemalloc.start()
    try:
        with pytest.raises(fastlock.DamagedError, match="its header has more than 128 MiB, which no model needs"):
            read_header(Endless(data, 2**45), "the file")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * 2**20 < MAX_HEADER_BYTES


def test_numbers_that_differ_take_no_memory() -> None:
    """Of a header of 64 MiB, all of it a list of different numbers."""
    numbers = np.arange(2**23, dtype="<u8").tobytes()
    found = read(header(entry("n", 9, struct.pack("<IQ", 10, 2**23) + numbers), entries=1))
    del numbers
    tracemalloc.start()
    try:
        with pytest.raises(fastlock.UnsupportedError, match="its layers have different n"):
            found.number("n")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**28


LARGE = (0, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def mutated(data: bytes, end: int, rng: np.random.Generator) -> bytes:
    """The same with one to four bytes of the header changed, or a piece taken out, put in, or cut off."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, min(end, len(found)))))
        match rng.integers(0, 6):
            case 0 | 1 | 2:
                found[at : at + 1] = rng.bytes(1)
            case 3:
                found[at : at + 8] = struct.pack("<Q", LARGE[rng.integers(0, len(LARGE))])
            case 4:
                del found[at : at + int(rng.integers(1, 9))]
            case 5:
                del found[int(rng.integers(0, len(found) + 1)) :]
    return bytes(found)


def relocked_or_refused(data: bytes, directory: Path, lock: fastlock.Lock) -> bool:
    """Whether a file is relocked, in which case it can be unlocked; if not, nothing is written."""
    source, out, back = (directory / name for name in ("source.gguf", "out.gguf", "back.gguf"))
    source.write_bytes(data)
    try:
        fastlock.relock_gguf(source, lock, out)
    except fastlock.FastlockError:
        assert sorted(path.name for path in directory.iterdir()) == ["source.gguf"]
        return False
    finally:
        assert source.read_bytes() == data, "the source was changed"
    fastlock.unlock_gguf(out, back)
    if b"fastlock.receipt" in data:
        out.unlink()
        fastlock.unlock_gguf(source, out)
        data = out.read_bytes()
    assert back.read_bytes() == data
    out.unlink()
    back.unlink()
    return True


def test_files_changed_at_random(tmp_path: Path) -> None:
    """By hand, 10,000 of them: FASTLOCK_MUTATIONS=10000."""
    lock, rng = lock_of([(0, 1), (2, 3)]), np.random.default_rng(7)
    sources = [Tiny(Kind.Q8_0), Tiny(Kind.Q8_0, biased=(0,)), Tiny(Kind.Q4_K)]
    files = [one.write(tmp_path / f"{i}.gguf").read_bytes() for i, one in enumerate(sources)]
    fastlock.relock_gguf(tmp_path / "1.gguf", lock, tmp_path / "relocked.gguf")
    files.append((tmp_path / "relocked.gguf").read_bytes())
    ends = [read(data).data_start for data in files]
    directory = tmp_path / "directory"
    directory.mkdir()
    done = 0
    for i in range(int(os.environ.get("FASTLOCK_MUTATIONS", "200"))):
        which = i % len(files)
        done += relocked_or_refused(mutated(files[which], ends[which], rng), directory, lock)
    assert done
