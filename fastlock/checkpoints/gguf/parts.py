"""The files of a GGUF model: one, or the parts that a large one is split into."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastlock.checkpoints.gguf.header import INT32, MAGIC, GgufHeader, GgufTensor, aligned, read_header
from fastlock.errors import DamagedError, FastlockError, UnsupportedError, shown
from fastlock.storage.files import DOWNLOAD_AGAIN, BytePatches, with_patches
from fastlock.storage.local import LocalFile, reading

SUFFIX = ".gguf"
SPLIT_TENSORS = "split.tensors.count"
_SPLIT_COUNT, _SPLIT_NUMBER = "split.count", "split.no"
# As llama.cpp names them (llama_split_path).
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufPart:
    """One file of a model, as it is or as it was before it was relocked.

    Attributes:
        path: by which it was found.
        file: where its data is.
        header: its header.
        head: all that comes before the data: the header and its padding.
        data_at: where in the file the data begins.
        data_length: how many bytes of data it has, padding included.
        patches: what the data has instead of the file's bytes, from the beginning of the data.
    """

    path: Path
    file: LocalFile
    header: GgufHeader
    head: bytes
    data_at: int
    data_length: int
    patches: BytePatches = ()

    def read(self, tensor: GgufTensor) -> bytes:
        """The data of a small tensor."""
        stored = self.file.read(self.data_at + tensor.offset, tensor.length)
        return with_patches(stored, tensor.offset, self.patches)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path or URL is that of a GGUF: told by its name, or by how the file begins."""
    name = str(path)
    if "://" in name:
        return name.lower().endswith(SUFFIX)
    if os.path.isdir(name):
        return False
    if name.lower().endswith(SUFFIX):
        return True
    try:
        with open(name, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a GGUF.

    Raises:
        UnsupportedError: it is a URL.
        FastlockError: it is no path.
    """
    if isinstance(path, str) and "://" in path:
        raise UnsupportedError(f"{path}: a GGUF is read from, and written to, this machine's disks. Download it first.")
    try:
        return Path(path)
    except TypeError:
        raise FastlockError(f"{path!r} is not a path; give the path of a GGUF file.") from None


def open_parts(path: Path) -> list[GgufPart]:
    """The files of a model.

    Args:
        path: its file, or the first part of a split one.

    Raises:
        UnsupportedError: the header is of a kind that fastlock does not read.
        DamagedError: a header is damaged or hostile, or the parts do not go together.
        FastlockError: it is not a GGUF, is another part than the first, or cannot be read.
    """
    first = _open_part(path)
    count = first.header.number(_SPLIT_COUNT) or 0
    if count <= 1:
        return [first]
    number = first.header.number(_SPLIT_NUMBER) or 0
    if number:
        raise FastlockError(f"{path}: is part {number + 1} of {count}. Give the first part.")
    parts = [first]
    for i, name in enumerate(part_paths(path, count)[1:], start=1):
        if not name.is_file():
            raise FastlockError(f"{path}: is the first of {count} parts, and {name.name} is not there. Download it.")
        part = _open_part(name)
        if part.header.number(_SPLIT_NUMBER) != i:
            raise DamagedError(f"{name}: is not part {i + 1} of {count}, as its name says. {DOWNLOAD_AGAIN}")
        parts.append(part)
    for part in parts:
        entry = part.header.entries.get(SPLIT_TENSORS)
        if entry is not None and (entry.kind, entry.count) != (INT32, None):
            raise DamagedError(f"{part.path}: its {SPLIT_TENSORS} is not an int32. {DOWNLOAD_AGAIN}")
    names = [tensor for part in parts for tensor in part.header.tensors]
    if len(set(names)) < len(names) or len(names) != first.header.number(SPLIT_TENSORS):
        raise DamagedError(
            f"{path}: its parts hold {len(names)} tensors, {len(set(names))} of them different, and it says "
            f"{first.header.number(SPLIT_TENSORS)}. {DOWNLOAD_AGAIN}"
        )
    return parts


def part_paths(first: Path, count: int) -> list[Path]:
    """The paths of all parts of a split model, as llama.cpp looks for them.

    Raises:
        FastlockError: the first is not named as it would be.
    """
    match = _PART.fullmatch(first.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        raise FastlockError(
            f"{first}: the first of {count} parts has to be named NAME-00001-of-{count:05d}{SUFFIX}: by that name the "
            "others are found."
        )
    return [first.with_name(f"{match[1]}-{i:05d}-of-{count:05d}{SUFFIX}") for i in range(1, count + 1)]


def name_of_first(name: str) -> str:
    """The name of the first part of the split model that a file is a part of by its name; its own name of any other."""
    match = _PART.fullmatch(name)
    return name if match is None else f"{match[1]}-00001-of-{match[3]}{SUFFIX}"


def _open_part(path: Path) -> GgufPart:
    with reading(path):
        if path.is_dir():
            raise FastlockError(f"{path}: is a directory. Give the path of a GGUF file.")
        file = LocalFile(path.resolve(strict=True))
    header = read_header(file, str(path))
    start = min(file.size, header.data_start)
    padding = file.read(len(header.raw), start - len(header.raw))
    length = file.size - start
    if any(padding) or length > aligned(header.data_end, header.alignment):
        what = "the padding of its header is not zero" if any(padding) else "it goes on after its last tensor"
        raise DamagedError(f"{shown(path)}: {what}, which no writer of GGUF leaves so. {DOWNLOAD_AGAIN}")
    return GgufPart(path, file, header, header.raw + padding, start, length)
