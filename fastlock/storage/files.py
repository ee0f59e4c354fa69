"""Reading files that may be hostile, and writing files that must never be half there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from fastlock.errors import FastlockError

CONFIG = "config.json"  # what makes a directory a checkpoint

Place = Path | str  # here, or the URL of another machine
Patches = Sequence[tuple[int, bytes]]  # offsets in a file, and other bytes that it is to have there

_SPOILT_URL = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")


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


def as_path(given: str | os.PathLike[str]) -> Path:
    """The path that a user gave."""
    try:
        return Path(given)
    except TypeError:
        raise FastlockError(f"{given!r} is no path; give the path of a file or directory.") from None


def as_place(given: str | os.PathLike[str]) -> Place:
    """What a user gave: a path here, or a URL of another machine ("s3://bucket/model"), without a slash at its end."""
    if isinstance(given, str) and "://" in given:
        return _path_of_url(given) if given.lower().startswith("file://") else given.rstrip("/")
    path = as_path(given)
    if _SPOILT_URL.match(str(path)):
        raise FastlockError(f"{path}: a URL that went through pathlib has lost a slash. Give it as text.")
    return path


def _path_of_url(url: str) -> Path:
    """The path that a file:// URL names on this machine."""
    host, slash, path = url[len("file://") :].partition("/")
    if not slash or host.lower() not in ("", "localhost"):
        raise FastlockError(f"{url}: names no file of this machine. Give its path, or file:///the/path.")
    return Path("/" + unquote(path, errors="surrogateescape").lstrip("/"))


def below(place: Place, name: str) -> Place:
    """What is at a relative name below a place."""
    return f"{place}/{name}" if isinstance(place, str) else place / name


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


def writable_directory(given: str | os.PathLike[str]) -> Path:
    """A directory that files can be written to, made where there is none.

    Raises:
        FastlockError: it can't be.
    """
    path = as_path(given)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # only a file tells: rights say little to root, or of a read-only disk
            pass
    except FileExistsError:
        raise FastlockError(f"{path}: is there already, and is no directory. Give another directory.") from None
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: can't be written ({error}). Give another directory.") from None
    return path
