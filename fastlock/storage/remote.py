"""Checkpoints on other machines, at URLs of any fsspec file system: read in ranges, and written config.json last.

An object store has no rename. What makes a directory a checkpoint is its config.json, which therefore appears last.
Until then an object of our own, `MARKER`, says what the objects there are going to be.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from fastlock.errors import DamagedError, FastlockError, FastlockWarning
from fastlock.storage.files import (
    CONFIG,
    File,
    Patches,
    already_exists,
    changed_while_read,
    holds_no_config,
    with_patches,
)
from fastlock.storage.traffic import TRAFFIC

MARKER = ".fastlock-unfinished"
MAX_REQUESTS = 8
PIECE_BYTES = 32 * 1024 * 1024

# What says that a file is another than before, in the words of the file systems that say it.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "blob_id", "mtime", "created", "last_modified")


class RemoteFile:
    """One file of a checkpoint on another machine, as it was when it was first looked at.

    Attributes:
        url: of the file.
        size: in bytes.
        identity: the URL, and what its file system says of size and version.
        patches: offsets, and the bytes that it is to have there instead of its own.
    """

    shared = True

    def __init__(self, fs: Any, path: str, info: dict[str, Any]) -> None:
        self.fs = fs
        self.path = path
        self.patches: Patches = ()
        self.url: str = fs.unstrip_protocol(path)
        self.identity = _identity(self.url, info)
        self.size: int = self.identity[1]

    def patched(self, patches: Patches) -> RemoteFile:
        """The same file with other bytes at some offsets."""
        changed = copy.copy(self)
        changed.patches = (*self.patches, *patches)
        return changed

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range; nothing else is fetched."""
        return with_patches(self._fetch(start, length), start, self.patches)

    @contextlib.contextmanager
    def view(self, start: int, length: int) -> Iterator[memoryview]:
        """The bytes of a range; nothing else is fetched."""
        yield memoryview(self.read(start, length))

    def copy_to(self, place: Path) -> None:
        """Fetch the whole file, without patches."""
        with reaching(self.url):
            self.fs.get_file(self.path, str(place))
        TRAFFIC.add(read=self.size)
        if place.stat().st_size != self.size:
            raise changed_while_read(self.url)

    def check_unchanged(self) -> None:
        """Raise a DamagedError if the file is not what it was when it was first looked at."""
        with reaching(self.url):
            now = _identity(self.url, self.fs.info(self.path))
        if now != self.identity:
            raise changed_while_read(self.url)

    def _fetch(self, start: int, length: int) -> bytes:
        if not length:
            return b""
        with reaching(self.url):
            data: bytes = self.fs.cat_file(self.path, start=start, end=start + length)
        TRAFFIC.add(read=len(data))
        if len(data) != length:
            raise changed_while_read(self.url)
        return data


class RemoteDirectory:
    """A directory to be made on another machine: use `create_remote_directory`.

    Everything is only noted at first, and done at the end.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root
        self._noted: dict[str, Callable[[], None]] = {}
        self._sources: list[File] = []
        self._plan = hashlib.sha256()

    def write(self, name: str, data: bytes) -> None:
        """A new file."""
        self._note(name, data, functools.partial(self._send, name, data))

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """A new file of pieces that need not be in memory together; what they are follows from the other files."""
        self._note(name, "parts", functools.partial(self._send_parts, name, parts))

    def link(self, name: str, source: File) -> None:
        """The same file, which has no patches: copied by its file system if that is this one, else sent."""
        if isinstance(source, RemoteFile) and source.fs == self._fs:
            self._note_source(name, source, functools.partial(self._copy_there, name, source))
        else:
            self.copy(name, source)

    def copy(self, name: str, source: File) -> None:
        """A file with its patches in it, sent piece by piece."""
        self._note_source(name, source, functools.partial(self._send_pieces, name, source))

    def _note(self, name: str, what: object, do: Callable[[], None]) -> None:
        self._noted[name] = do
        self._plan.update(repr((name, what)).encode("utf-8", "surrogatepass"))

    def _note_source(self, name: str, source: File, do: Callable[[], None]) -> None:
        self._sources.append(source)
        self._note(name, (source.identity, list(source.patches)), do)

    def _finish(self) -> None:
        """Do all that was noted. Doing it again is harmless: it puts the same bytes into the same places."""
        self._claim()
        last = self._noted.pop(CONFIG)
        with ThreadPoolExecutor(MAX_REQUESTS) as threads:
            for steps in (self._noted.values(), [source.check_unchanged for source in self._sources]):
                for step in [threads.submit(step) for step in steps]:
                    step.result()
        last()
        self._remove_marker()

    def _remove_marker(self) -> None:
        """The directory is complete by now, so a failure is not an error."""
        marker = self._at(MARKER)
        try:
            self._fs.rm_file(marker)
        except FileNotFoundError:
            pass
        except Exception as error:  # every file system raises errors of its own
            warnings.warn(
                f"{self._fs.unstrip_protocol(self._root)}: is complete, but a step after that failed "
                f"({type(error).__name__}: {str(error)[:300]}). Remove {self._fs.unstrip_protocol(marker)}, which only "
                "says that something is being made there.",
                FastlockWarning,
                stacklevel=2,
            )

    def _claim(self) -> None:
        """Say that this is being made here: nothing may be here but what the same run left when it was stopped."""
        mine = self._plan.hexdigest().encode()
        bucket = self._root.partition("/")[0]
        if bucket and not self._fs.exists(bucket):
            raise FastlockError(f"{self._fs.unstrip_protocol(bucket)}: does not exist. Create it first.")
        try:
            self._with_parents(MARKER, lambda path: self._fs.pipe_file(path, mine, mode="create"))
        except FileExistsError:
            if self._fs.cat_file(self._at(MARKER)) != mine:
                raise FastlockError(
                    f"{self._fs.unstrip_protocol(self._root)}: another run is making something else there, or was "
                    f"stopped ({MARKER}). Wait for it to end, or remove what is there."
                ) from None
            return
        if any(name != MARKER for name in _listed(self._fs, self._root)):
            self._fs.rm_file(self._at(MARKER))
            raise already_exists(self._fs.unstrip_protocol(self._root))

    def _send(self, name: str, data: bytes) -> None:
        self._with_parents(name, lambda path: self._fs.pipe_file(path, data))
        TRAFFIC.add(written=len(data))

    def _send_pieces(self, name: str, source: File) -> None:
        starts = range(0, source.size, PIECE_BYTES)
        self._send_parts(name, (source.read(start, min(PIECE_BYTES, source.size - start)) for start in starts))

    def _send_parts(self, name: str, parts: Iterable[bytes]) -> None:
        with self._with_parents(name, lambda path: self._fs.open(path, "wb")) as file:
            for part in parts:
                file.write(part)
                TRAFFIC.add(written=len(part))

    def _copy_there(self, name: str, source: RemoteFile) -> None:
        self._with_parents(name, lambda path: self._fs.cp_file(source.path, path))

    def _with_parents(self, name: str, put: Callable[[str], Any]) -> Any:
        """Make a file, and the directories above it where the file system has such things."""
        try:
            return put(self._at(name))
        except FileNotFoundError:
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            return put(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def remote_files(url: str, any_directory: bool = False) -> dict[str, RemoteFile]:
    """Every file below a URL, by its name there.

    Args:
        url: of a directory.
        any_directory: whether it may be something else than a checkpoint.

    Raises:
        DamagedError: a name in it leads out of it.
        FastlockError: it cannot be reached, or is not a checkpoint.
    """
    with reaching(url):
        fs, root = opened(url)
        if not any_directory and not fs.exists(f"{root}/{CONFIG}"):
            raise holds_no_config(url)
        listed = _listed(fs, root)
    for name in listed:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
            raise DamagedError(f"{url}: the name {name[:200]!a} leads out of it. Do not trust this checkpoint.")
    return {name: RemoteFile(fs, f"{root}/{name}", info) for name, info in listed.items() if name != MARKER}


def remote_file(url: str) -> RemoteFile | None:
    """The file at a URL, None where there is none.

    Raises:
        FastlockError: it cannot be reached.
    """
    with reaching(url):
        fs, path = opened(url)
        try:
            info = fs.info(path)
        except FileNotFoundError:
            return None
        return RemoteFile(fs, path, info) if info["type"] == "file" else None


def write_remote(url: str, data: bytes) -> None:
    """Write a file at a URL, over what is there.

    Raises:
        FastlockError: it cannot be reached.
    """
    with reaching(url):
        fs, path = opened(url)
        fs.pipe_file(path, data)


@contextlib.contextmanager
def create_remote_directory(url: str) -> Iterator[RemoteDirectory]:
    """Make a directory at a URL: everything is done when the block ends, its config.json last.

    A run that was stopped can be made again, and overwrites what it left.

    Raises:
        DamagedError: a file that goes into it was changed meanwhile.
        FastlockError: there is something there, another run is making something else there, or it cannot be reached.
    """
    with reaching(url):
        fs, root = opened(url)
    directory = RemoteDirectory(fs, root)
    yield directory
    with reaching(url):
        directory._finish()


def check_absent_there(url: str) -> None:
    """Raise if there is anything at a URL but what a stopped run left."""
    with reaching(url):
        names = _listed(*opened(url))
    if names and (MARKER not in names or CONFIG in names):
        raise already_exists(url)


def normalised(url: str) -> str:
    """The one way to write a URL.

    Raises:
        FastlockError: there is no such file system, or its package is not installed.
    """
    with reaching(url):
        fs, root = opened(url)
        normal: str = fs.unstrip_protocol(root)
    return normal


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what a file system or its network refuses into a FastlockError that names the URL."""
    try:
        yield
    except FastlockError:
        raise
    except ImportError as error:
        raise FastlockError(
            f"{url}: needs a package that is not installed ({error}). For s3:// run: pip install 'fastlock[s3]'"
        ) from None
    except Exception as error:  # every file system raises errors of its own
        raise FastlockError(
            f"{url}: cannot be reached ({type(error).__name__}: {str(error)[:300]}). Check the address, your "
            "credentials and the network."
        ) from None


def opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, which remembers no listings, and the path in it."""
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url, use_listings_cache=False)
    return fs, path.rstrip("/")


def _listed(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """What is below a directory, by name there; none where there is no such directory."""
    try:
        files = fs.find(root, detail=True)
    except FileNotFoundError:
        return {}
    below = {path.removeprefix(f"{root}/"): info for path, info in files.items() if path.startswith(f"{root}/")}
    # Consoles of object stores write "a/" for an empty directory.
    return {name: info for name, info in below.items() if name and not (name.endswith("/") and not info["size"])}


def _identity(url: str, info: dict[str, Any]) -> tuple[Any, ...]:
    versions = (info[key] for key in _VERSIONS if info.get(key))
    # Some file systems give a time as a number in a listing, and as a datetime alone.
    return (url, int(info["size"]), *(v.timestamp() if isinstance(v, datetime) else v for v in versions))
