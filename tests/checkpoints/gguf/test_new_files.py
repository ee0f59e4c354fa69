"""Writing new GGUF files: shared blocks, the ways without them, and nothing left of what goes wrong."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

import fastlock
from fastlock.checkpoints.gguf import new_files
from fastlock.checkpoints.gguf.header import read_header
from fastlock.checkpoints.gguf.new_files import (
    BLOCK_BYTES,
    FICLONERANGE,
    FileRange,
    NewFile,
    created,
    place_of_writing,
)
from fastlock.storage.local import LocalFile
from tests.helpers.gguf_files import Kind, Tiny, lock_of

LOCK = lock_of([(0, 1), (2, 3)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Tiny(Kind.Q8_0, biased=(0,)).write(tmp_path / "m.gguf")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Clones:
    """A file system with shared blocks: FICLONERANGE as linux/fs.h describes it, and the ranges that were shared."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self.copied = 0

    def ioctl(self, target: int, request: int, argument: bytes) -> int:
        assert request == FICLONERANGE == 0x4020940D
        source, start, length, at = struct.unpack("=qQQQ", argument)
        for number in (start, length, at):
            if number % BLOCK_BYTES:
                raise OSError(errno.EINVAL, "not whole blocks")
        os.pwrite(target, os.pread(source, length, start), at)
        self.ranges.append((start, length, at))
        return 0

    def copy_file_range(self, source: int, target: int, count: int, start: int, at: int) -> int:
        self.copied += count
        return os.pwrite(target, os.pread(source, count, start), at)


@pytest.fixture
def clones(monkeypatch) -> Clones:
    found = Clones()
    monkeypatch.setattr(fcntl, "ioctl", found.ioctl)
    monkeypatch.setattr(os, "copy_file_range", found.copy_file_range)
    return found


def test_weights_are_shared_where_the_file_system_can(source, tmp_path, clones) -> None:
    """All but the two blocks that they lie in with something else."""
    header = read_header(LocalFile(source), "m")
    fastlock.relock_gguf(source, LOCK, tmp_path / "out.gguf")
    assert clones.copied < 2 * BLOCK_BYTES
    ((start, length, at),) = clones.ranges
    assert header.data_start <= start < header.data_start + BLOCK_BYTES
    assert source.stat().st_size - BLOCK_BYTES < start + length <= source.stat().st_size
    assert at - start == read_header(LocalFile(tmp_path / "out.gguf"), "m").data_start - header.data_start
    assert fastlock.verify(tmp_path / "out.gguf", LOCK)
    fastlock.unlock_gguf(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert len(clones.ranges) == 2
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


def test_a_copy_shares_nothing(source, tmp_path, clones) -> None:
    fastlock.relock_gguf(source, LOCK, tmp_path / "out.gguf", copy=True)
    assert not clones.ranges
    assert clones.copied > 10 * BLOCK_BYTES


@pytest.mark.parametrize("lacking", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, 0])
def test_without_any_help_of_the_file_system(lacking: int, source, tmp_path, monkeypatch) -> None:
    """Some say that they cannot by copying nothing."""

    def refused(*_: object) -> int:
        if lacking:
            raise OSError(lacking, os.strerror(lacking))
        return 0

    fastlock.relock_gguf(source, LOCK, tmp_path / "expected.gguf")
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTTY, "no")))
    monkeypatch.setattr(os, "copy_file_range", refused)
    monkeypatch.setattr(new_files, "_PIECE", 1000)
    fastlock.relock_gguf(source, LOCK, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("shift", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 32])
@pytest.mark.parametrize("length", [0, 100, BLOCK_BYTES, 3 * BLOCK_BYTES + 17])
def test_ranges_of_any_place_and_length(shift: int, length: int, tmp_path, clones) -> None:
    data = np.random.default_rng(0).bytes(6 * BLOCK_BYTES)
    (tmp_path / "old").write_bytes(data)
    start = 700
    piece = FileRange(LocalFile(tmp_path / "old"), start, length)
    with created([NewFile(tmp_path / "new", [bytes(start + shift), piece, b"end"], [], 0o640)], share=True):
        pass
    assert (tmp_path / "new").read_bytes() == bytes(start + shift) + data[start : start + length] + b"end"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert bool(clones.ranges) == (shift % BLOCK_BYTES == 0 and length > 2 * BLOCK_BYTES)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_disk_that_is_full_midway(parts: int, tmp_path) -> None:
    """The kernel's own refusal: no file of this process may be larger than so much."""
    source = Tiny(Kind.Q8_0, parts=parts).write(tmp_path / "m.gguf")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / ("out.gguf" if parts == 1 else "out-00001-of-00003.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(fastlock.FastlockError, match="cannot be written .*; nothing was changed"):
            fastlock.relock_gguf(source, LOCK, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parts_that_were_put_in_place_are_taken_away_again(tmp_path, monkeypatch) -> None:
    """The first part comes last: without it the others are no model."""
    source = Tiny(Kind.Q8_0, parts=3).write(tmp_path / "m.gguf")
    before, placed, link = names(tmp_path), [], os.link

    def put(temporary: Path, path: Path) -> None:
        placed.append(Path(path).name)
        if len(placed) == 3:
            raise FileExistsError(path)
        link(temporary, path)

    monkeypatch.setattr(os, "link", put)
    with pytest.raises(fastlock.FastlockError, match="already exists"):
        fastlock.relock_gguf(source, LOCK, tmp_path / "out-00001-of-00003.gguf")
    assert placed == [f"out-0000{i}-of-00003.gguf" for i in (3, 2, 1)]
    assert names(tmp_path) == before


def test_one_of_the_parts_is_there_already(tmp_path) -> None:
    source = Tiny(Kind.Q8_0, parts=3).write(tmp_path / "m.gguf")
    (tmp_path / "out-00003-of-00003.gguf").write_bytes(b"mine")
    with pytest.raises(fastlock.FastlockError, match=r"out-00003-of-00003\.gguf: already exists"):
        fastlock.relock_gguf(source, LOCK, tmp_path / "out-00001-of-00003.gguf")
    assert len(names(tmp_path)) == 4


def test_without_hard_links(source, tmp_path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    fastlock.relock_gguf(source, LOCK, tmp_path / "out.gguf")
    assert fastlock.verify(tmp_path / "out.gguf", LOCK)
    assert names(tmp_path) == ["m.gguf", "out.gguf"]


@pytest.mark.parametrize("undone", [False, True])
def test_a_source_that_changes_meanwhile(undone: bool, source, tmp_path, monkeypatch) -> None:
    fastlock.relock_gguf(source, LOCK, tmp_path / "out.gguf")
    write, before = new_files._write, names(tmp_path)
    changed = tmp_path / "out.gguf" if undone else source

    def changing(*arguments: object) -> None:
        write(*arguments)
        os.utime(changed, ns=(1, 1))

    monkeypatch.setattr(new_files, "_write", changing)
    new, relock, unlock = tmp_path / "new.gguf", fastlock.relock_gguf, fastlock.unlock_gguf
    call = (lambda: unlock(changed, new)) if undone else (lambda: relock(changed, LOCK, new))
    with pytest.raises(fastlock.DamagedError, match="was changed while it was being read"):
        call()
    assert names(tmp_path) == before


def test_two_runs_at_once(source, tmp_path) -> None:
    out = tmp_path / "out.gguf"
    with place_of_writing(out).open("wb") as other:
        other.write(bytes(3_000_000))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(fastlock.FastlockError, match="another process is making it right now"):
            fastlock.relock_gguf(source, LOCK, out)
    fastlock.relock_gguf(source, LOCK, out)
    assert names(tmp_path) == ["m.gguf", "out.gguf"], "what a killed run left is gone"
    assert fastlock.verify(out, LOCK), "and no end of it is in the new file"


def test_a_run_that_is_killed(source, tmp_path) -> None:
    """Nothing is at its place, and the next run succeeds."""
    out = tmp_path / "out.gguf"
    child = os.fork()
    if not child:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        with created([NewFile(out, [bytes(1000)], [], 0o600)], share=True):
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert names(tmp_path) == [".out.gguf.fastlock", "m.gguf"]
    fastlock.relock_gguf(source, LOCK, out)
    assert fastlock.verify(out, LOCK)
    assert names(tmp_path) == ["m.gguf", "out.gguf"]


def test_permissions_are_those_of_the_source(source, tmp_path) -> None:
    source.chmod(0o440)
    fastlock.relock_gguf(source, LOCK, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == 0o440
