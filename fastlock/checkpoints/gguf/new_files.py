"""New files that appear whole or not at all, made of ranges of others: shared blocks where the file system has them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlock.errors import FastlockError
from fastlock.storage.files import BytePatches, already_exists
from fastlock.storage.local import LocalFile
from fastlock.storage.new_directory import check_absent

FICLONERANGE = 0x4020940D  # ioctl of linux/fs.h: share a range of another file's blocks
# File systems with shared blocks share them whole: such a block, or a divisor of it, is what theirs have.
BLOCK_BYTES = 4096
_CLONE_RANGE = struct.Struct("=qQQQ")
_PIECE = 8 * 2**20
# What a file system says where it cannot copy a range by itself; anything else, as a full disk, is an error.
_LACKING = frozenset(
    (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.EBADF, errno.EPERM, errno.ENOTTY)
)


@dataclass(frozen=True)
class FileRange:
    """So many bytes of a file."""

    file: LocalFile
    start: int
    length: int


@dataclass(frozen=True)
class NewFile:
    """What a file is to hold.

    Attributes:
        path: its place, where nothing may be.
        pieces: its bytes, one piece after the other.
        patches: offsets, and the bytes that it is to have there instead.
        mode: its permissions.
    """

    path: Path
    pieces: Sequence[bytes | FileRange]
    patches: BytePatches
    mode: int


@contextlib.contextmanager
def created(files: Sequence[NewFile], share: bool) -> Iterator[None]:
    """Write files beside their places, and put them there when the block ends: all of them, the first one last.

    Args:
        files: what they are to hold. A split model is found by its first file.
        share: whether they may share blocks with the files that they are made of.

    Raises:
        FastlockError: there is something at one of the places, another process is writing there, or it cannot be
            written. Then none of them is there.
    """
    for file in files:
        check_absent(file.path)
    placed: list[Path] = []
    done = False
    with contextlib.ExitStack() as opened:
        try:
            temporaries = [opened.enter_context(_temporary(file.path)) for file in files]
            for file, (fd, _) in zip(files, temporaries, strict=True):
                _write(fd, file, share)
            yield
            for file, (_, temporary) in reversed(list(zip(files, temporaries, strict=True))):
                _put(temporary, file.path)
                placed.append(file.path)
            _sync_directory(files[0].path.parent)
            done = True
        except (OSError, ValueError) as error:
            raise FastlockError(f"{files[0].path}: cannot be written ({error}); nothing was changed.") from None
        finally:
            for path in [] if done else placed:
                with contextlib.suppress(OSError):
                    path.unlink()


def place_of_writing(path: Path) -> Path:
    """Where a file is written before it is put in its place; what a killed run left there, the next one overwrites."""
    return path.with_name(f".{path.name}.fastlock")


def copy_range(piece: FileRange, target: int, at: int, share: bool) -> None:
    """Copy a range of a file into another from an offset on: shared, by the file system, or through memory.

    Args:
        piece: what to copy.
        target: the descriptor of the other file.
        at: the offset in it.
        share: whether blocks may be shared. They can be where both offsets are equally far into a block.

    Raises:
        OSError: the file system refuses.
    """
    source = os.open(piece.file.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = -piece.start % BLOCK_BYTES
        shareable = (piece.length - before) // BLOCK_BYTES * BLOCK_BYTES
        if share and (at - piece.start) % BLOCK_BYTES == 0 and shareable > 0:
            start = piece.start + before
            if _clone(source, start, target, at + before, shareable):
                _copy(source, piece.start, target, at, before)
                end = before + shareable
                _copy(source, piece.start + end, target, at + end, piece.length - end)
                return
        _copy(source, piece.start, target, at, piece.length)
    finally:
        os.close(source)


def _clone(source: int, start: int, target: int, at: int, length: int) -> bool:
    """Share whole blocks; False where the file system does not."""
    try:
        fcntl.ioctl(target, FICLONERANGE, _CLONE_RANGE.pack(source, start, length, at))
    except OSError:
        return False
    return True


def _copy(source: int, start: int, target: int, at: int, length: int) -> None:
    done, by_kernel = 0, hasattr(os, "copy_file_range")
    while done < length:
        left = length - done
        if by_kernel:
            try:
                copied = os.copy_file_range(source, target, left, start + done, at + done)
            except OSError as error:
                if error.errno not in _LACKING:
                    raise
                copied = 0
            if not copied:  # some file systems say so instead of an error
                by_kernel = False
        else:
            piece = os.pread(source, min(left, _PIECE), start + done)
            if not piece:
                raise OSError(errno.EIO, "the source ends earlier than it did")
            copied = os.pwrite(target, piece, at + done)
        done += copied


def _write(fd: int, file: NewFile, share: bool) -> None:
    at = 0
    for piece in file.pieces:
        if isinstance(piece, FileRange):
            copy_range(piece, fd, at, share)
            at += piece.length
        else:
            _write_bytes(fd, piece, at)
            at += len(piece)
    for start, data in file.patches:
        _write_bytes(fd, data, start)
    with contextlib.suppress(PermissionError):
        os.fchmod(fd, file.mode)
    os.fsync(fd)


def _write_bytes(fd: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    """An empty file to write to, and nobody else's; it is removed at the end, unless it has another name by then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = place_of_writing(path)
    while True:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd, path)
            if not _is_at(fd, temporary):  # another run put it in its place between our opening and our locking it
                continue
            os.ftruncate(fd, 0)
            try:
                yield fd, temporary
            finally:
                if _is_at(fd, temporary):
                    temporary.unlink()
            return
        finally:
            os.close(fd)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FastlockError(f"{path}: another process is making it right now. Wait for it to end.") from None
    except OSError as error:
        if error.errno not in _LACKING | {errno.ENOLCK}:
            raise


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _put(temporary: Path, path: Path) -> None:
    """Give a file its name, which nothing may have."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise already_exists(path) from None
    except OSError:  # no hard links
        check_absent(path)
        temporary.rename(path)
    else:
        temporary.unlink()


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
