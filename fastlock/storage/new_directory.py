"""New directories that appear whole or not at all, made of links to what did not change."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path

from fastlock.errors import FastlockError, FastlockWarning
from fastlock.storage.byte_columns import ByteColumns
from fastlock.storage.files import CONFIG, already_exists
from fastlock.storage.local import LocalFile, reading, reflink
from fastlock.storage.places import Place, as_place
from fastlock.storage.remote import (
    RemoteDirectory,
    RemoteFile,
    check_absent_there,
    create_remote_directory,
    normalised,
)

_RENAME_EXCHANGE = 2  # of renameat2(2)
_AT_FDCWD = -100
# What a file system says of something that it does not have. Which errno it picks for that differs.
_LACKING = frozenset(
    (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOTTY, errno.ENOLCK)
)
_NO_HARD_LINK = _LACKING | {errno.EXDEV, errno.EMLINK}


class NewDirectory:
    """A directory being made beside its place; nobody sees it before it is whole. Use `create_directory`.

    Attributes:
        path: where it is being made.
    """

    def __init__(self, path: Path, source: Place, mode: int, in_place: bool) -> None:
        self.path = path
        self._source = source
        self._mode = mode
        self._in_place = in_place
        self._origins: dict[Path, Path] = {}  # of directories that have another name in the source

    def write(self, name: str, data: bytes) -> None:
        """A new file, synced."""
        self.write_parts(name, (data,))

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """A new file, synced, of pieces that need not be in memory together."""
        with self._place(name).open("xb") as file:
            for data in parts:
                file.write(data)
            file.flush()
            _settle(file.fileno(), self._mode_of_new(name))

    def link(self, name: str, source: LocalFile | RemoteFile) -> None:
        """The same file without copying its bytes: shared blocks, else a hard link, else a symbolic link.

        It is a copy if it is on another machine, if the file system has none of these, or in place, if it has neither
        of the first two.
        """
        if isinstance(source, RemoteFile):
            self.copy(name, source)
            return
        place = self._place(name, source)
        if reflink(source.path, place):
            with place.open("rb") as file:
                _settle(file.fileno(), source.mode)
            return
        linked = _tried(lambda: os.link(source.path, place), _NO_HARD_LINK)
        if not linked and not self._in_place:  # a symbolic link would point into what is about to be removed
            linked = _tried(lambda: place.symlink_to(source.path), _LACKING)
        if not linked:
            self.copy(name, source)

    def copy(self, name: str, source: LocalFile | RemoteFile) -> None:
        """A copy, synced, with the file's permissions and its patches in it."""
        place = self._place(name, source)
        source.copy_to(place)
        with place.open("r+b") as file:
            for start, data in source.patches:
                file.seek(start)
                new = data.over(file.read(len(data)), 0) if isinstance(data, ByteColumns) else data
                file.seek(start)
                file.write(new)
            file.flush()
            _settle(file.fileno(), source.mode if isinstance(source, LocalFile) else None)

    def sync(self) -> None:
        """Sync every file that something else wrote, with the permissions of a new file."""
        for path in [path for path in self.path.rglob("*") if path.is_file()]:
            with path.open("rb") as file:
                _settle(file.fileno(), self._mode_of_new(path.relative_to(self.path).as_posix()))

    def _mode_of_new(self, name: str) -> int | None:
        """The permissions of the source's file of that name, else of its config.json."""
        if isinstance(self._source, Path):
            for path in (self._source / name, self._source / CONFIG):
                if path.is_file():
                    return path.stat().st_mode & 0o777
        return None

    def _place(self, name: str, source: LocalFile | RemoteFile | None = None) -> Path:
        if isinstance(source, LocalFile) and isinstance(self._source, Path):
            below, origin = Path(name).parent, source.path.parent
            while below.name and below.name == origin.name and self._source in origin.parents:
                self._origins[below] = origin
                below, origin = below.parent, origin.parent
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _finish(self) -> None:
        """Sync the directories, each with the permissions that it has in the source; the innermost first."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            _sync(Path(directory), self._mode_of_directory(Path(directory).relative_to(self.path)))
        _sync(self.path, self._mode)

    def _mode_of_directory(self, below: Path) -> int | None:
        if isinstance(self._source, Path):
            for path in (self._source / below, self._origins.get(below)):
                if path is not None and path.is_dir():
                    return path.stat().st_mode & 0o777
        return None


@contextlib.contextmanager
def create_directory(out: Place, source: Place, in_place: bool) -> Iterator[NewDirectory | RemoteDirectory]:
    """Make a directory: it appears at `out` when the block ends, whole and on disk, or not at all.

    On another machine, its config.json appears last: without that, it is not a checkpoint.

    Args:
        out: its place, where nothing may be; with `in_place` the checkpoint's own, which is then exchanged for the
            new one in one step of the file system. `locked_in_place` keeps others out of it meanwhile.
        source: the checkpoint's directory, whose permissions the new one gets; those of the directory above `out`, if
            the source is on another machine.
        in_place: whether `out` is `source`.

    Raises:
        FastlockError: there is something at `out`, another process is making it, or it cannot be written; `out` is
            then as it was. What goes wrong once the new directory is in its place is a FastlockWarning.
    """
    if isinstance(out, str):
        with create_remote_directory(out) as there:
            yield there
    else:
        with create_local_directory(out, source, in_place) as here:
            yield here


@contextlib.contextmanager
def create_local_directory(out: Path, source: Place, in_place: bool) -> Iterator[NewDirectory]:
    """`create_directory` on this machine."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        status = (out.parent if isinstance(source, str) else source).stat()
        with _claimed(out) as temporary:
            if not in_place:
                check_absent(out)
            directory = NewDirectory(temporary, source, status.st_mode & 0o777, in_place)
            yield directory
            directory._finish()
            if in_place:
                _exchange_for(temporary, out, status)
            else:
                _rename(temporary, out)
            _after(temporary, out, in_place)
    except (OSError, ValueError, shutil.Error) as error:
        raise FastlockError(f"{out}: cannot be written ({error}); nothing was changed.") from None


def _rename(temporary: Path, out: Path) -> None:
    try:
        temporary.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise already_exists(out) from None
        raise


def _exchange_for(temporary: Path, out: Path, old: os.stat_result) -> None:
    """Exchange the new directory for the old one, and for that one only: what comes out of it is removed."""
    _exchange(temporary, out)
    if not os.path.samestat(old, temporary.lstat()):
        _exchange(temporary, out)
        raise FastlockError(
            f"{out}: is not the directory that it was at the start. Run it again when nothing moves it."
        )


def _after(temporary: Path, out: Path, in_place: bool) -> None:
    """What is left to do once the new directory is in its place: it is complete, so a failure is not an error."""
    try:
        _sync(out.parent)
        if in_place:
            _remove(temporary)
    except OSError as error:
        left = f" Remove {temporary}, the directory that it replaced, if it is still there." if in_place else ""
        warnings.warn(
            f"{out}: is complete, but a step after that failed ({error}).{left}", FastlockWarning, stacklevel=2
        )


def check_absent(out: Place) -> None:
    """Raise if there is anything at `out`."""
    if isinstance(out, str):
        check_absent_there(out)
        return
    try:
        there = out.exists() or out.is_symlink()
    except (OSError, ValueError) as error:
        raise _not_usable(out, error) from None
    if there:
        raise already_exists(out)


def _not_usable(path: str | os.PathLike[str], error: Exception) -> FastlockError:
    return FastlockError(f"{path}: is not a usable path ({error}). Give another one.")


def place_of_making(out: Path) -> Path:
    """The directory beside `out` in which it is made.

    Its name follows from `out`: whatever a killed run left there is removed by the next.
    """
    return out.with_name(f".{out.name}.fastlock")


@contextlib.contextmanager
def locked_in_place(out: Place, in_place: bool) -> Iterator[None]:
    """Keep other runs out of a checkpoint that is to be exchanged, from before it is read until the old one is gone.

    After the exchange the lock is on the old directory, at its `place_of_making`, and `_claimed` has locked the new
    one: neither can be taken. If not `in_place`, it does nothing.

    Raises:
        FastlockError: another process has it, or it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        if in_place and isinstance(out, Path):
            with reading(out):
                stack.enter_context(_locked(out, out))
        yield


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The `place_of_making` of `out`: empty, and nobody else's."""
    temporary = place_of_making(out)
    with _locked(temporary, out, make=True) as fd:
        _clear(temporary)
        try:
            yield temporary
        finally:
            # What prevents this would only hide the error that is on its way.
            with contextlib.suppress(OSError):
                if _is_at(fd, temporary):  # after a rename or an exchange it is not
                    _remove(temporary)


@contextlib.contextmanager
def _locked(directory: Path, out: Path, make: bool = False) -> Iterator[int]:
    """A descriptor of a directory that no other process has locked; `out` is what the error names."""
    while True:
        was_there = make and not _make(directory)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            try:
                locked = _tried(functools.partial(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB), _LACKING)
            except BlockingIOError:
                raise FastlockError(f"{out}: another process is making it right now. Wait for it to end.") from None
            if was_there and not locked:
                raise FastlockError(
                    f"{directory}: another run is working there, or was stopped: this file system has no locks to tell "
                    "which. If nothing is working there, remove it and run again."
                )
            if _is_at(fd, directory):
                yield fd
                return
            # It was finished or removed between our opening it and our locking it: try again.
        finally:
            os.close(fd)


def _make(directory: Path) -> bool:
    """Make a directory; False if it is there already."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _remove(directory: Path) -> None:
    _make_writable(directory)
    shutil.rmtree(directory)


def _make_writable(directory: Path) -> None:
    """Let what is in a directory be removed, whatever the permissions of the directories in it."""
    with contextlib.suppress(PermissionError):  # another user's; its permissions may suffice
        directory.chmod(0o700)
    with os.scandir(directory) as entries:
        below = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in below:
        _make_writable(path)


def _clear(directory: Path) -> None:
    _make_writable(directory)
    for entry in list(os.scandir(directory)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _exchange(a: Path, b: Path) -> None:
    """Let two paths change places in one step: a reader sees one or the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    done: int = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(
            code, f"{os.strerror(code)}: this file system cannot exchange directories; give a separate output directory"
        )


def _settle(fd: int, mode: int | None) -> None:
    """Give a new file or directory its permissions, and sync it."""
    if mode is not None:
        _tried(lambda: os.fchmod(fd, mode), _LACKING)
    _tried(lambda: os.fsync(fd), _LACKING if stat.S_ISDIR(os.fstat(fd).st_mode) else frozenset())


def _tried(step: Callable[[], None], lacking: Set[int]) -> bool:
    """Do something that the file system may not have; False if it answers with one of these errno."""
    try:
        step()
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in lacking:
            raise
        return False
    return True


def _sync(directory: Path, mode: int | None = None) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _settle(fd, mode)
    finally:
        os.close(fd)


def check_paths(source: str | os.PathLike[str], out: str | os.PathLike[str], in_place: bool) -> tuple[Place, Place]:
    """The places of a checkpoint and of the directory to make from it, links followed.

    Raises:
        FastlockError: there is something at `out` already (in place: it is not the checkpoint), or one of the two lies
            where the other would be overwritten or removed.
    """
    old, new = _resolved(source), _resolved(out)
    if in_place:
        _check_in_place(source, old, out, new)
        return old, old
    target = as_place(out)
    check_absent(target)
    if f"{new}/".startswith(f"{old}/"):
        raise FastlockError(f"{target}: is inside the checkpoint itself. Give a directory outside it.")
    if isinstance(target, str):
        return old, new
    target = target.parent.resolve() / target.name  # a link at its own name would have been found above
    check_not_in_the_way(source, target)
    return old, target


def check_not_in_the_way(read: str | os.PathLike[str], out: Place) -> None:
    """Refuse to make `out` where what is read for it would be removed.

    Raises:
        FastlockError: `read`, links followed, is in the `place_of_making` of `out`.
    """
    place = _resolved(read)
    if isinstance(place, Path) and isinstance(out, Path) and place.is_relative_to(place_of_making(out)):
        raise FastlockError(f"{read}: is where {out} is made, and would be removed. Give it another name first.")


def _check_in_place(source: str | os.PathLike[str], old: Place, out: str | os.PathLike[str], new: Place) -> None:
    if old != new:
        raise FastlockError(f"{out}: in place means the checkpoint itself, {source}. Leave out one of the two.")
    if isinstance(old, str):
        raise FastlockError(
            f"{old}: cannot be changed in place: its file system cannot rename. Give a separate output directory."
        )


def _resolved(name: str | os.PathLike[str]) -> Place:
    place = as_place(name)
    try:
        return normalised(place) if isinstance(place, str) else place.resolve()
    except (OSError, ValueError) as error:
        raise _not_usable(name, error) from None
