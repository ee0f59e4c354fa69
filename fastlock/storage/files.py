"""Reading files that may be hostile, and writing files that must never be half there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastlock.errors import FastlockError

MAX_JSON_BYTES = 64 * 1024 * 1024
CONFIG = "config.json"  # what makes a directory a checkpoint

Patches = Sequence[tuple[int, bytes]]  # offsets in a file, and other bytes that it is to have there


class File(Protocol):
    """A file of a checkpoint that is read in ranges: here, on another machine, or made up.

    Attributes:
        size: in bytes.
        identity: what changes when the file does.
        patches: what `read` puts in place of the file's own bytes.
    """

    size: int
    identity: tuple[Any, ...]
    patches: Patches

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""

    def check_unchanged(self) -> None:
        """Raise if it is not what it was when it was first looked at."""


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file, refused when there are more than `limit`."""
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist, or is no regular file"
            raise FastlockError(f"{path}: {what}. Give the path of a file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)  # `read` sets aside as much memory as it is asked for
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: cannot be read ({error}). Check the path and its permissions.") from None
    if len(data) > limit:
        raise FastlockError(
            f"{path}: larger than {limit // 2**20} MiB, which no file of this kind is. Give the file itself."
        )
    return data


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


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object out of a file that may be hostile.

    Raises:
        FastlockError: it is none, or says something twice.
    """
    try:
        value = json.loads(data, object_pairs_hook=no_duplicates)
        if not isinstance(value, dict):
            raise TypeError("it is no JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise FastlockError(f"{where}: not JSON ({str(error)[:200]}). Get the checkpoint again.") from None
    return value


def read_all(file: File, where: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole of a small file.

    Raises:
        FastlockError: it is larger than `limit`.
    """
    if file.size > limit:
        raise FastlockError(f"{where}: {file.size} bytes, which no file of this kind has. Get the checkpoint again.")
    return file.read(0, file.size)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values as a dictionary; ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it says something twice")
    return found


def with_patches(data: bytes, start: int, patches: Patches) -> bytes:
    """The bytes of a file from `start` on, with those of the patches that lie in them."""
    end = start + len(data)
    for offset, patch in patches:
        first, last = max(start, offset), min(end, offset + len(patch))
        if first < last:
            data = data[: first - start] + patch[first - offset : last - offset] + data[last - start :]
    return data


class Text:
    """A small file that is not on disk as it is wanted. Attributes: data; the others as of `LocalFile`."""

    patches: Patches = ()

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.identity = (data,)

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        return self.data[start : start + length]

    def check_unchanged(self) -> None:
        """It never is."""
