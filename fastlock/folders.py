"""A checkpoint's files, and new directories that appear whole, made of links to what did not change."""

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

from fastlock.errors import FastlockError
from fastlock.files import CONFIG, Patches, Place
from fastlock.remote import (
    RemoteFile,
    RemoteFolder,
    check_absent_there,
    remote_file,
    remote_files,
    remote_folder,
    with_patches,
)

_FICLONE = 0x40049409  # ioctl of linux/fs.h: share another file's blocks
_RENAME_EXCHANGE = 2  # of renameat2(2)
_AT_FDCWD = -100
_MADV_POPULATE_READ = 22  # Linux 5.14
_HUGE, _PIECE = 2 * 1024 * 1024, 128 * 1024


class LocalFile:
    """One regular file of a checkpoint, links followed, as it was when it was first looked at.

    Attributes:
        path: the file itself (in a Hugging Face cache: the blob).
        size: in bytes.
        identity: device, inode, size and time of last change.
        patches: offsets, and the bytes that it is to have there instead of its own.
        viewed: how many bytes of all files this process has mapped.
    """

    viewed = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.patches: Patches = ()
        with _reading(path):
            status = path.stat()
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def patched(self, patches: Patches) -> LocalFile:
        """The same file with other bytes at some offsets."""
        changed = copy.copy(self)
        changed.patches = (*self.patches, *patches)
        return changed

    def read(self, start: int, length: int) -> bytes:
        """The bytes of a range."""
        with _reading(self.path), self._open() as fd:
            data = os.pread(fd, length, start)
        if len(data) != length:
            raise self.changed()
        return with_patches(data, start, self.patches)

    @contextlib.contextmanager
    def view(self, start: int, length: int) -> Iterator[memoryview]:
        """The bytes of a range, mapped and not copied, and without patches; of a cold file, only the range is read."""
        before = start % mmap.ALLOCATIONGRANULARITY
        with contextlib.ExitStack() as opened:
            with _reading(self.path):
                fd = opened.enter_context(self._open())
                self._check(os.fstat(fd))  # a mapping beyond a file's end kills the process
                mapped = mmap.mmap(fd, before + length, prot=mmap.PROT_READ, offset=start - before)
                opened.enter_context(mapped)
                _read_ahead(mapped, start - before)
                LocalFile.viewed += length
            with memoryview(mapped) as whole, whole[before:] as wanted:
                yield wanted

    def copy_to(self, place: Path) -> None:
        """Make a copy, without patches: of shared blocks where the file system has them."""
        if not _reflink(self.path, place):
            shutil.copyfile(self.path, place)

    def check_unchanged(self) -> None:
        """Raise if the file is not what it was when it was first looked at."""
        with _reading(self.path):
            self._check(self.path.stat())

    def changed(self) -> FastlockError:
        """The error that says so."""
        return FastlockError(
            f"{self.path}: was changed while it was being read. Run it again when nobody writes to it."
        )

    def _check(self, status: os.stat_result) -> None:
        if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self.identity:
            raise self.changed()

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def files_in(directory: Place) -> dict[str, LocalFile] | dict[str, RemoteFile]:
    """Every file below a directory, by its name there ("original/params.json").

    Raises:
        FastlockError: there is no such directory, or something in it is neither file nor directory, or a broken link.
    """
    return remote_files(directory) if isinstance(directory, str) else local_files(directory)


def file_at(place: Place) -> LocalFile | RemoteFile | None:
    """The file at a place, None where there is none."""
    if isinstance(place, str):
        return remote_file(place)
    with _reading(place):
        return LocalFile(place) if place.is_file() else None


def local_files(directory: Path) -> dict[str, LocalFile]:
    """`files_in` of a directory of this machine."""
    with _reading(directory):
        if not directory.is_dir():
            raise FastlockError(
                f"{directory}: no such directory. Give a checkpoint's directory (config.json, *.safetensors)."
            )
        return dict(_walk(directory, ""))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of what can't be read what it is."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: can't be read ({error}). Check the path and its permissions.") from None


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, LocalFile]]:
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(directory / entry.name, f"{prefix}{entry.name}/")
            continue
        try:
            path = Path(os.path.realpath(entry.path, strict=True))
            is_file = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            raise FastlockError(
                f"{entry.path}: can't be followed ({error.strerror}). Complete the checkpoint (a download that was "
                "cut off?), or remove the broken link."
            ) from None
        if not is_file:
            raise FastlockError(
                f"{entry.path}: is no regular file. A checkpoint holds files and real directories only."
            )
        yield prefix + entry.name, LocalFile(path)


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


def _read_ahead(mapped: mmap.mmap, base: int) -> None:
    """Bring a mapping of the file from `base` on into memory: in large pieces, and nothing beyond it.

    Huge pages read a cold file in one go; the edges, which are no whole huge pages, by asking for them in pieces, since
    the kernel answers one request with one window of read-ahead.
    """
    length = len(mapped)
    first = min(length, -base % _HUGE)
    last = max(first, (base + length) // _HUGE * _HUGE - base)
    mapped.madvise(mmap.MADV_RANDOM)
    edges = [(0, length)]
    with contextlib.suppress(OSError, AttributeError):  # no huge pages for files
        if first < last:
            mapped.madvise(mmap.MADV_HUGEPAGE, first, last - first)
        edges = [(0, first), (last, length)]
    for begin, end in edges:
        for piece in range(begin // mmap.PAGESIZE * mmap.PAGESIZE, end, _PIECE):
            mapped.madvise(mmap.MADV_WILLNEED, piece, min(_PIECE, end - piece))
    with contextlib.suppress(OSError):
        mapped.madvise(_MADV_POPULATE_READ)


class NewFolder:
    """A directory being made beside its place; nobody sees it before it is whole. Use `new_folder`.

    Attributes:
        path: where it is being made.
    """

    def __init__(self, path: Path, mode: int, in_place: bool) -> None:
        self.path = path
        self._mode = mode
        self._in_place = in_place

    def write(self, name: str, data: bytes) -> None:
        """A new file, synced."""
        with self._place(name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def link(self, name: str, source: LocalFile | RemoteFile) -> None:
        """The same file without copying its bytes: shared blocks, else a hard link, else a symbolic link.

        In place, where neither of the first two can be had, and of what is on another machine, it is a copy.
        """
        if isinstance(source, RemoteFile):
            self.copy(name, source)
            return
        place = self._place(name)
        if _reflink(source.path, place):
            return
        try:
            os.link(source.path, place)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
                raise
            if self._in_place:
                self.copy(name, source)  # a symbolic link would point into what is about to be cleared away
            else:
                place.symlink_to(source.path)

    def copy(self, name: str, source: LocalFile | RemoteFile) -> None:
        """A copy, synced, with the file's patches in it."""
        place = self._place(name)
        source.copy_to(place)
        with place.open("r+b") as file:
            for start, data in source.patches:
                file.seek(start)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """Sync every file that something else wrote."""
        for directory, _, names in os.walk(self.path):
            for name in names:
                _sync(os.path.join(directory, name), os.O_RDONLY)

    def _place(self, name: str) -> Path:
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _finish(self) -> None:
        self.path.chmod(self._mode)
        for directory, _, _ in os.walk(self.path):
            _sync(directory)


@contextlib.contextmanager
def new_folder(out: Place, source: Place, in_place: bool) -> Iterator[NewFolder | RemoteFolder]:
    """Make a directory: it appears at `out` when the block ends, whole and on disk, or not at all.

    On another machine, its config.json appears last: without that, it is no checkpoint.

    Args:
        out: its place, where nothing may be; with `in_place` the checkpoint's own, which is then exchanged for the
            new one in one step of the file system.
        source: the checkpoint's directory, whose permissions the new one gets; it gets those of the directory above it
            where the source is on another machine.
        in_place: whether `out` is `source`.

    Raises:
        FastlockError: there is something at `out`, another process is making it, or it can't be written.
    """
    if isinstance(out, str):
        with remote_folder(out) as there:
            yield there
    else:
        with new_local_folder(out, source, in_place) as here:
            yield here


@contextlib.contextmanager
def new_local_folder(out: Path, source: Place, in_place: bool) -> Iterator[NewFolder]:
    """`new_folder` on this machine."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        mode = (out.parent if isinstance(source, str) else source).stat().st_mode & 0o777
        with _claimed(out) as temporary:
            if not in_place:
                check_absent(out)
            folder = NewFolder(temporary, mode, in_place)
            yield folder
            folder._finish()
            if in_place:
                _exchange(temporary, out)
            else:
                temporary.rename(out)
            _sync(out.parent)
    except (OSError, ValueError, shutil.Error) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(out) from None
        raise FastlockError(f"{out}: can't be written ({error}); nothing was changed.") from None


def is_there(place: Place) -> bool:
    """Whether there is anything at a place; on another machine, whether there is a checkpoint."""
    return file_at(f"{place}/{CONFIG}") is not None if isinstance(place, str) else os.path.lexists(place)


def check_absent(out: Place) -> None:
    """Raise if there is anything at `out`."""
    if isinstance(out, str):
        check_absent_there(out)
        return
    try:
        there = out.exists() or out.is_symlink()
    except (OSError, ValueError) as error:
        raise FastlockError(f"{out}: is no usable path ({error}).") from None
    if there:
        raise _exists(out)


def _exists(out: Path) -> FastlockError:
    return FastlockError(f"{out}: exists already. Give a directory that does not, or remove it first.")


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The directory beside `out` in which it is made: empty, and no other process's.

    Its name follows from `out`, so that whatever a killed run left there is cleared away by the next.
    """
    temporary = out.with_name(f".{out.name}.fastlock")
    while True:
        temporary.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FastlockError(f"{out}: another process is making it right now. Wait for it to end.") from None
            if not _is_at(fd, temporary):
                continue  # it was finished or cleared away between our opening and our locking
            _clear(temporary)
            try:
                yield temporary
            finally:
                # After a rename it is gone; after an exchange it is what was there before.
                shutil.rmtree(temporary, ignore_errors=True)
            return
        finally:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _clear(directory: Path) -> None:
    for entry in list(os.scandir(directory)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _reflink(source: Path, place: Path) -> bool:
    """Make `place` a file that shares the blocks of `source`; False, and no file, where that can't be."""
    with source.open("rb") as old, place.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return True
        except OSError:
            place.unlink()
            return False


def _exchange(a: Path, b: Path) -> None:
    """Let two paths change places in one step: a reader sees either the one or the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    done: int = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: this file system can't exchange directories; use --out")


def _sync(path: str | Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
