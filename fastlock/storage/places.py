"""Places: paths of this machine and URLs of others, and what is there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote

from fastlock.errors import FastlockError
from fastlock.storage.files import CONFIG
from fastlock.storage.local import LocalFile, local_files, reading
from fastlock.storage.remote import RemoteFile, remote_file, remote_files

Place = Path | str  # here, or the URL of another machine

_SPOILT_URL = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user gave.

    Raises:
        FastlockError: it is something else.
    """
    try:
        return Path(name)
    except TypeError:
        raise FastlockError(f"{name!r} is not a path; give the path of a file or directory.") from None


def as_place(name: str | os.PathLike[str]) -> Place:
    """What a user gave: a path here, or a URL of another machine ("s3://bucket/model"), without a slash at its end.

    Raises:
        FastlockError: it is neither, or a URL of files on another machine.
    """
    if isinstance(name, str) and "://" in name:
        return _path_of_url(name) if name.lower().startswith("file://") else name.rstrip("/")
    path = as_path(name)
    if _SPOILT_URL.match(str(path)):
        raise FastlockError(f"{path}: a URL that went through pathlib has lost a slash. Give it as text.")
    return path


def _path_of_url(url: str) -> Path:
    """The path that a file:// URL names on this machine."""
    host, slash, path = url[len("file://") :].partition("/")
    if not slash or host.lower() not in ("", "localhost"):
        raise FastlockError(f"{url}: does not name a file of this machine. Give its path, or file:///the/path.")
    return Path("/" + unquote(path, errors="surrogateescape").lstrip("/"))


def below(place: Place, name: str) -> Place:
    """What is at a relative name below a place."""
    return f"{place}/{name}" if isinstance(place, str) else place / name


def writable_directory(name: str | os.PathLike[str]) -> Path:
    """A directory that files can be written to, made where there is none.

    Raises:
        FastlockError: it cannot be written to.
    """
    path = as_path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # only a file tells: rights say little to root, or of a read-only disk
            pass
    except FileExistsError:
        raise FastlockError(f"{path}: already exists, and is not a directory. Give another directory.") from None
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: cannot be written ({error}). Give another directory.") from None
    return path


def files_in(directory: Place, any_directory: bool = False) -> dict[str, LocalFile] | dict[str, RemoteFile]:
    """Every file below a directory, by its name there ("original/params.json").

    Args:
        directory: a path or a URL.
        any_directory: whether it may be something else than a checkpoint, an adapter, say; of URLs alone it is asked.

    Raises:
        DamagedError: something in it is neither a file nor a directory, a link is broken, or a name leads out of it.
        FastlockError: there is no such directory, or it cannot be read.
    """
    return remote_files(directory, any_directory) if isinstance(directory, str) else local_files(directory)


def file_at(place: Place) -> LocalFile | RemoteFile | None:
    """The file at a place, None where there is none."""
    if isinstance(place, str):
        return remote_file(place)
    with reading(place):
        return LocalFile(place) if place.is_file() else None


def is_there(place: Place) -> bool:
    """Whether there is anything at a place; on another machine, whether there is a checkpoint."""
    return file_at(f"{place}/{CONFIG}") is not None if isinstance(place, str) else os.path.lexists(place)


def files_digest(directory: str | Path) -> str:
    """SHA-256 of the names, sizes and times of the files in a directory: quick, and it changes when a file does."""
    sha = hashlib.sha256()
    for path in sorted(path for path in as_path(directory).iterdir() if path.is_file()):
        state = path.stat()
        sha.update(json.dumps([path.name, state.st_size, state.st_mtime_ns]).encode())
    return sha.hexdigest()
