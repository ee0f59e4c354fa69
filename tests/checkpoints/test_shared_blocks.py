"""A gate where the file system shares blocks: its ioctl is put in by hand, and all around it is what runs there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

import fastlock
from fastlock.checkpoints.layout import linked_name
from tests.checkpoints.test_crash import contents
from tests.helpers.families import gated_lock, tiny_model

FICLONE = 0x40049409  # of linux/fs.h


class SharedBlocks:
    """FICLONE as ioctl_ficlone(2) has it: an empty file gets all bytes of another, or there is an error and no bytes.

    Attributes:
        cloned: the inodes of the files that were cloned.
        failing: what it answers, in turn, for ever; 0 where it clones.
        marked: whether bytes are inverted on the way, but for `kept`, where in which file (by its inode).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = (0,)) -> None:
        self.cloned: list[int] = []
        self.failing, self.calls = failing, 0
        self.marked, self.kept = False, dict[int, list[slice]]()
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, new: int, request: int, old: int) -> int:
        assert request == FICLONE
        assert os.fstat(new).st_size == 0
        code = self.failing[self.calls % len(self.failing)]
        self.calls += 1
        if code:
            raise OSError(code, os.strerror(code))
        of_old = os.fstat(old)
        data = os.pread(old, of_old.st_size, 0)
        os.pwrite(new, self.inverted(of_old.st_ino, data) if self.marked else data, 0)
        self.cloned.append(of_old.st_ino)
        return 0

    def inverted(self, inode: int, data: bytes) -> bytes:
        made = bytearray(byte ^ 0xFF for byte in data)
        for part in self.kept.get(inode, []):
            made[part] = data[part]
        return bytes(made)


def gated(tmp_path: Path) -> tuple[fastlock.Lock, Path, set[str]]:
    """A lock that is a gate alone, a checkpoint of several shards, and their names."""
    model, source = tiny_model("llama", torch.bfloat16), tmp_path / "source"
    model.save_pretrained(source, max_shard_size="30KB")
    shards = set(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 2
    return gated_lock(model, constant=False), source, shards


def where(shard: Path, names: set[str]) -> list[slice]:
    """Where these tensors lie in a shard, as the safetensors format has it."""
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return [
        slice(*(8 + length + offset for offset in header[name]["data_offsets"])) for name in sorted(names & set(header))
    ]


def test_every_shard_shares_its_blocks_and_comes_back(tmp_path, monkeypatch) -> None:
    lock, source, shards = gated(tmp_path)
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "copied")
    wanted, blocks = contents(tmp_path / "copied"), SharedBlocks(monkeypatch)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    assert contents(tmp_path / "locked") == wanted
    for shard in shards:
        new = (tmp_path / "locked" / linked_name(shard)).stat()
        assert (source / shard).stat().st_ino in blocks.cloned
        assert (new.st_nlink, new.st_ino != (source / shard).stat().st_ino) == (1, True)
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == contents(source) == before
    shutil.copytree(source, tmp_path / "place")
    fastlock.relock_checkpoint(tmp_path / "place", lock, tmp_path / "place", in_place=True)
    assert contents(tmp_path / "place") == wanted
    fastlock.unlock_checkpoint(tmp_path / "place", tmp_path / "place", in_place=True)
    assert contents(tmp_path / "place") == before


def test_only_the_locked_projections_are_written(tmp_path, monkeypatch) -> None:
    """All bytes but theirs are what the ioctl gave, which is told by giving it other ones than the source's."""
    lock, source, shards = gated(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "copied")
    locked = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in set(lock.layers.tolist())}
    blocks = SharedBlocks(monkeypatch)
    blocks.marked = True
    blocks.kept = {(source / shard).stat().st_ino: where(source / shard, locked) for shard in shards}
    assert sum(map(len, blocks.kept.values())) == len(locked) == 2
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    for shard in shards:
        made = (tmp_path / "locked" / linked_name(shard)).read_bytes()
        right = (tmp_path / "copied" / linked_name(shard)).read_bytes()
        assert made == blocks.inverted((source / shard).stat().st_ino, right)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSPC], ids=errno.errorcode.get)
def test_where_some_files_cannot_be_shared(code: int, tmp_path, monkeypatch) -> None:
    """Such as those on another file system, or over a quota: they are copied or linked, and nothing empty stays."""
    lock, source, _ = gated(tmp_path)
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "copied")
    blocks = SharedBlocks(monkeypatch, (code, 0))
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    assert contents(tmp_path / "locked") == contents(tmp_path / "copied")
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == contents(source) == before
    assert 0 < len(blocks.cloned) < blocks.calls
