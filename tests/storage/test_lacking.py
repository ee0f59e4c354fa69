"""File systems that lack something: fastlock goes another way by itself, and leaves nothing behind."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastlock
from tests.helpers.families import random_lock, tiny_model


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def fails(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def no_fsync_of_directories(monkeypatch) -> None:
    fsync = os.fsync

    def only_files(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            fails(errno.EINVAL)()
        fsync(fd)

    monkeypatch.setattr("os.fsync", only_files)


def no_links(monkeypatch) -> None:
    monkeypatch.setattr("os.link", fails(errno.EPERM))
    monkeypatch.setattr(Path, "symlink_to", fails(errno.EPERM))


LACKING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no flock (Lustre, NFS)": lambda patch: patch.setattr("fcntl.flock", fails(errno.ENOSYS)),
    "no flock (FUSE)": lambda patch: patch.setattr("fcntl.flock", fails(errno.EOPNOTSUPP)),
    "no mmap": lambda patch: patch.setattr("mmap.mmap", fails(errno.ENODEV)),
    "no hard links (ENOSYS)": lambda patch: patch.setattr("os.link", fails(errno.ENOSYS)),
    "no hard links (EINVAL)": lambda patch: patch.setattr("os.link", fails(errno.EINVAL)),
    "no links (exFAT)": no_links,
    "no chmod": lambda patch: patch.setattr("os.fchmod", fails(errno.EPERM)),
    "no fsync of directories": no_fsync_of_directories,
}


@pytest.mark.parametrize("lacking", LACKING)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_file_system_lacks(lacking: str, in_place: bool, tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    before, lock = contents(tmp_path / "source"), random_lock(model)
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "wanted")
    wanted = contents(tmp_path / "wanted")
    out, back = (tmp_path / "source",) * 2 if in_place else (tmp_path / "out", tmp_path / "back")
    with monkeypatch.context() as patch:
        LACKING[lacking](patch)
        fastlock.relock_checkpoint(tmp_path / "source", lock, out, in_place=in_place)
        assert contents(out) == wanted
        assert fastlock.verify(out, lock)
        fastlock.unlock_checkpoint(out, back, in_place=in_place)
    assert contents(back) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_real_trouble_is_not_taken_for_a_lack(code: int, tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr("os.link", fails(code))
    with pytest.raises(fastlock.FastlockError, match=os.strerror(code)):
        fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_locks_what_another_run_left_is_not_cleared_away(tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / ".out.fastlock").mkdir()
    (tmp_path / ".out.fastlock" / "half").touch()
    monkeypatch.setattr("fcntl.flock", fails(errno.ENOSYS))
    with pytest.raises(fastlock.FastlockError, match="remove it and run again"):
        fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
    assert (tmp_path / ".out.fastlock" / "half").is_file()
