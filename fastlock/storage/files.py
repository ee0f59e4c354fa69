"""Reading files that may be hostile, and writing files that must never be half there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastlock.errors import DamagedError, FastlockError
from fastlock.storage.byte_columns import ByteColumns

MAX_JSON_BYTES = 64 * 1024 * 1024
# No config nests deeper; what reads and copies one calls itself at each level.
MAX_CONFIG_DEPTH = 64
CONFIG = "config.json"  # what makes a directory a checkpoint

DOWNLOAD_AGAIN = "Download the checkpoint again."
_GIVE_A_CHECKPOINT = f"Give a checkpoint's directory ({CONFIG}, *.safetensors) or its URL."

BytePatches = Sequence[tuple[int, bytes]]  # offsets in a file, and other bytes that it is to have there
Patches = Sequence[tuple[int, bytes | ByteColumns]]


class File(Protocol):
    """A file of a checkpoint that is read in ranges: here, on another machine, or in memory.

    Attributes:
        size: in bytes.
        identity: what changes when the file does.
        patches: what `read` puts in place of the file's own bytes.
        shared: whether its bytes may belong to another file as well, which a link to it could overwrite.
    """

    size: int
    identity: tuple[Any, ...]
    patches: Patches
    shared: bool

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""

    def check_unchanged(self) -> None:
        """Raise a DamagedError if it is not what it was when it was first looked at."""


class InMemoryFile:
    """A small file whose bytes are on no disk: what a directory is to hold. Attributes: data; else as of `File`."""

    patches: Patches = ()
    shared = False

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.identity = (data,)

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        return self.data[start : start + length]

    def check_unchanged(self) -> None:
        """Does nothing: nobody else can change these bytes."""


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        DamagedError: there are more than `limit`.
        FastlockError: it is not a file, or cannot be read.
    """
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist, or is not a regular file"
            raise FastlockError(f"{path}: {what}. Give the path of a file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)  # `read` sets aside as much memory as it is asked for
    except (OSError, ValueError) as error:
        raise cannot_be_read(path, error) from None
    if len(data) > limit:
        raise _too_large(str(path), limit)
    return data


def read_all(file: File, where: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole of a small file.

    Raises:
        DamagedError: it is larger than `limit`.
    """
    if file.size > limit:
        raise _too_large(where, limit)
    return file.read(0, file.size)


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside `path`, sync, then rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: cannot be written ({error}); nothing was changed.") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()


def parse_json(data: bytes | str, where: str, remedy: str = DOWNLOAD_AGAIN) -> Any:
    """Anything that JSON can say, out of a file that may be hostile.

    Raises:
        DamagedError: it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error, remedy) from None


def parse_rows(text: str, where: str, layout: str) -> Iterator[tuple[str, Any]]:
    """Every entry of JSON lines, or of one JSON array, with its place for messages.

    Args:
        text: of the file.
        where: the file, for messages.
        layout: what the file should hold, in a sentence for messages.

    Raises:
        DamagedError: it is not JSON.
    """
    if text.lstrip().startswith("["):
        for number, entry in enumerate(parse_json(text, where, layout), start=1):
            yield f"{where}, entry {number}", entry
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split inside strings, at U+2028
        if line.strip():
            place = f"{where}, line {number}"
            yield place, parse_json(line, place, layout)


def parse_object(data: bytes, where: str, remedy: str = DOWNLOAD_AGAIN, depth: int | None = None) -> dict[str, Any]:
    """A JSON object out of a file that may be hostile.

    Args:
        data: of the file.
        where: the file, for messages.
        remedy: what to do, a sentence for messages.
        depth: how deep objects and lists may lie in each other; by default as deep as Python parses them.

    Raises:
        DamagedError: it is not one, or it says something twice, or lies deeper.
    """
    try:
        value = json_object(data)
        if depth is not None:
            _check_depth(value, depth)
        return value
    except ValueError as error:
        raise _not_json(where, error, remedy) from None


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is not one, or it says something twice.
    """
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def with_patches(data: bytes, start: int, patches: Patches) -> bytes:
    """The bytes of a file from `start` on, with those of the patches that lie in them."""
    end = start + len(data)
    for offset, patch in patches:
        first, last = max(start, offset), min(end, offset + len(patch))
        if first < last:
            if isinstance(patch, ByteColumns):
                new = patch.over(data[first - start : last - start], first - offset)
            else:
                new = patch[first - offset : last - offset]
            data = data[: first - start] + new + data[last - start :]
    return data


def lie_in(patches: Patches, start: int, length: int) -> bool:
    """Whether any of these patches changes a range of a file."""
    return any(offset < start + length and start < offset + len(patch) for offset, patch in patches)


def cannot_be_read(path: Path, error: Exception) -> FastlockError:
    """The error that says so."""
    return FastlockError(f"{path}: cannot be read ({error}). Check the path and its permissions.")


def changed_while_read(place: Path | str) -> DamagedError:
    """The error that says so."""
    return DamagedError(f"{place}: was changed while it was being read. Run it again when nothing writes to it.")


def already_exists(place: Path | str) -> FastlockError:
    """The error that says so, of a directory that is to be made."""
    return FastlockError(f"{place}: already exists. Choose a place where nothing is yet, or remove this one first.")


def holds_no_config(place: Path | str) -> FastlockError:
    """The error that says so, of what should be a checkpoint."""
    return FastlockError(f"{place}: holds no {CONFIG}. {_GIVE_A_CHECKPOINT}")


def no_such_directory(place: Path | str) -> FastlockError:
    """The error that says so, of what should be a checkpoint."""
    what = "is a file, and no directory" if os.path.isfile(place) else "no such directory"
    return FastlockError(f"{place}: {what}. {_GIVE_A_CHECKPOINT}")


def _check_depth(value: Any, depth: int) -> None:
    """Raise a ValueError if objects and lists lie deeper in each other than that."""
    inside = [value]
    for _ in range(depth):
        nested = (one.values() if isinstance(one, dict) else one for one in inside)
        inside = [held for values in nested for held in values if isinstance(held, dict | list)]
        if not inside:
            return
    raise ValueError(f"it is nested more than {depth} deep")


def _too_large(where: str, limit: int) -> DamagedError:
    return DamagedError(
        f"{where}: larger than {limit // 2**20} MiB, which no file of this kind is. Check that it is the right file, "
        "or download it again."
    )


def _not_json(where: str, error: Exception, remedy: str) -> DamagedError:
    return DamagedError(f"{where}: not JSON ({str(error)[:200]}). {remedy}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values as a dictionary; ValueError where a key is there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"it gives {key[:80]!a} twice")
            seen.add(key)
    return value
