"""Reading files that may be hostile, and writing files that must never be half there."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from fastlock.errors import FastlockError


def as_path(given: str | os.PathLike[str]) -> Path:
    """The path that a user gave."""
    try:
        return Path(given)
    except TypeError:
        raise FastlockError(f"{given!r} is no path; give the path of a file or directory.") from None


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
