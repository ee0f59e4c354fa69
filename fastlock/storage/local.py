"""Files of this machine, read and mapped in ranges."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastlock.errors import DamagedError
from fastlock.storage.files import (
    Patches,
    cannot_be_read,
    changed_while_read,
    lie_in,
    no_such_directory,
    with_patches,
)
from fastlock.storage.traffic import TRAFFIC

_FICLONE = 0x40049409  # ioctl of linux/fs.h: share another file's blocks

_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22  # Linux 5.14

_HUGE, _PIECE = 2 * 1024 * 1024, 128 * 1024


class LocalFile:
    """One regular file of a checkpoint, links followed, as it was when it was first looked at.

    Attributes:
        path: the file itself (in a Hugging Face cache: the blob).
        size: in bytes.
        mode: its permissions.
        identity: device, inode, size and time of last change.
        patches: offsets, and the bytes that it is to have there instead of its own.
        shared: whether another name leads to it, too: it was reached by a symbolic link, or has hard links.
    """

    def __init__(self, path: Path, followed: bool = False) -> None:
        self.path = path
        self.patches: Patches = ()
        with reading(path):
            status = path.stat()
        self.size = status.st_size
        self.mode = status.st_mode & 0o777
        self.shared = followed or status.st_nlink > 1
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def patched(self, patches: Patches) -> LocalFile:
        """The same file with other bytes at some offsets."""
        changed = copy.copy(self)
        changed.patches = (*self.patches, *patches)
        return changed

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        return with_patches(self._read(start, length), start, self.patches)

    @contextlib.contextmanager
    def view(self, start: int, length: int) -> Iterator[memoryview]:
        """The bytes of a range, mapped and not copied unless patches are in it; of a cold file, no others are read."""
        if lie_in(self.patches, start, length):
            yield memoryview(self.read(start, length))
            return
        before = start % mmap.ALLOCATIONGRANULARITY
        with contextlib.ExitStack() as opened:
            with reading(self.path):
                fd = opened.enter_context(self._open())
                self._check(os.fstat(fd))  # a mapping beyond a file's end kills the process
                mapped = _mapped(fd, start - before, before + length)
                TRAFFIC.add(read=length)
                if mapped is not None:
                    opened.enter_context(mapped)
                    _read_ahead(mapped, start - before)
            if mapped is None:
                yield memoryview(self._read(start, length))
                return
            with memoryview(mapped) as whole, whole[before:] as wanted:
                yield wanted

    def copy_to(self, place: Path) -> None:
        """Make a copy, without patches: of shared blocks where the file system has them."""
        if not reflink(self.path, place):
            shutil.copyfile(self.path, place)

    def check_unchanged(self) -> None:
        """Raise a DamagedError if the file is not what it was when it was first looked at."""
        with reading(self.path):
            self._check(self.path.stat())

    def _read(self, start: int, length: int) -> bytes:
        with reading(self.path), self._open() as fd:
            data = os.pread(fd, length, start)
            while len(data) < length and (more := os.pread(fd, length - len(data), start + len(data))):
                data += more  # Linux reads at most 2 GiB at once
        if len(data) != length:
            raise changed_while_read(self.path)
        return data

    def _check(self, status: os.stat_result) -> None:
        if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self.identity:
            raise changed_while_read(self.path)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def local_files(directory: Path) -> dict[str, LocalFile]:
    """`files_in` of a directory of this machine."""
    with reading(directory):
        if not directory.is_dir():
            raise no_such_directory(directory)
        return dict(_walk(directory, ""))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a FastlockError that names the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise cannot_be_read(path, error) from None


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, LocalFile]]:
    with os.scandir(directory) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(directory / entry.name, f"{prefix}{entry.name}/")
            continue
        try:
            path = Path(os.path.realpath(entry.path, strict=True))
            is_file = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            raise DamagedError(
                f"{entry.path}: cannot be followed ({error.strerror}). Complete the checkpoint (was a download cut "
                "off?), or remove the broken link."
            ) from None
        if not is_file:
            raise DamagedError(
                f"{entry.path}: is not a regular file. A checkpoint holds only files and real directories: remove it."
            )
        yield prefix + entry.name, LocalFile(path, followed=entry.is_symlink())


def _mapped(fd: int, start: int, length: int) -> mmap.mmap | None:
    """A mapping of a range; None where the file system maps no files (some of FUSE)."""
    try:
        return mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=start)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOSYS, errno.EINVAL, errno.EACCES, errno.EPERM):
            raise
        return None


def _read_ahead(mapped: mmap.mmap, base: int) -> None:
    """Bring a mapping of the file from `base` on into memory: in large pieces, and nothing beyond it.

    Huge pages read a cold file in one go. The edges, which do not fill a huge page, are asked for in pieces, since the
    kernel answers one request with one window of read-ahead.
    """
    length = len(mapped)
    first = min(length, -base % _HUGE)
    last = max(first, (base + length) // _HUGE * _HUGE - base)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_RANDOM)
    edges = [(0, length)]
    with contextlib.suppress(OSError, AttributeError):  # no huge pages for files
        if first < last:
            mapped.madvise(mmap.MADV_HUGEPAGE, first, last - first)
        edges = [(0, first), (last, length)]
    for begin, end in edges:
        for piece in range(begin // mmap.PAGESIZE * mmap.PAGESIZE, end, _PIECE):
            with contextlib.suppress(OSError):
                mapped.madvise(mmap.MADV_WILLNEED, piece, min(_PIECE, end - piece))
    _populate(mapped)


def _populate(mapped: mmap.mmap) -> None:
    """Map every page, where the kernel can. Other threads run meanwhile: `mmap.madvise` would keep them waiting."""
    _LIBC.madvise(
        ctypes.c_void_p(np.frombuffer(mapped, np.uint8).ctypes.data), ctypes.c_size_t(len(mapped)), _MADV_POPULATE_READ
    )


def reflink(source: Path, place: Path) -> bool:
    """Make `place` a file that shares the blocks of `source`; False, and no file, where the file system cannot."""
    with source.open("rb") as old, place.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return True
        except OSError:
            place.unlink()
            return False
