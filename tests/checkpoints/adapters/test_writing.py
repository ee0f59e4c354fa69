"""How a relocked adapter is written: all of it on disk before anybody sees it, piece by piece, or not at all."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fastlock
from fastlock.checkpoints.adapters.adapter_files import header_of, with_tensors, without_tensors
from fastlock.checkpoints.adapters.folding import BasePart
from fastlock.storage import new_directory
from fastlock.storage.files import InMemoryFile
from fastlock.storage.local import LocalFile
from tests.helpers.adapters import config_of, save_adapter

HERE = {"stacks": ["transformers"]}
# Config, weights and receipt, and beside them the first config and header.
FILES = 5


def test_every_file_is_synced_before_the_adapter_is_there(
    base: Path, part: BasePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = save_adapter(config_of("lora"), tmp_path / "adapter"), tmp_path / "out"
    synced, fsync, rename = set(), os.fsync, new_directory._rename

    def noted(fd: int) -> None:
        fsync(fd)
        synced.add((os.fstat(fd).st_ino, os.fstat(fd).st_size))

    def checked(temporary: Path, target: Path) -> None:
        made = [path.stat() for path in (temporary, *temporary.rglob("*"))]
        assert {(status.st_ino, status.st_size) for status in made} <= synced
        rename(temporary, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(new_directory, "_rename", checked)
    fastlock.relock_adapter(source, base, part.lock, out, **HERE)
    assert sum(path.is_file() for path in out.rglob("*")) == FILES + 1  # with PEFT's model card


@pytest.mark.parametrize("failing", range(FILES))
def test_whichever_file_cannot_be_written_nothing_is_left(
    failing: int, base: Path, part: BasePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    count, write = itertools.count(), new_directory.NewDirectory.write_parts

    def full(self, name, parts):
        if next(count) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, parts)

    monkeypatch.setattr(new_directory.NewDirectory, "write_parts", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(fastlock.FastlockError, match="No space left on device.*nothing was changed"):
        fastlock.relock_adapter(source, base, part.lock, tmp_path / "out", **HERE)
    assert set(tmp_path.iterdir()) == before


def test_weights_of_many_pieces_are_as_they_were_with_others_after_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{number}": torch.randn(101, 997, generator=generator) for number in range(7)}
    safetensors.torch.save_file(tensors, tmp_path / "weights")
    data, file = (tmp_path / "weights").read_bytes(), LocalFile(tmp_path / "weights")
    start = len(header_of(file))
    changed = torch.randn(500_000, generator=generator)
    added = {"new": torch.randn(300_001, generator=generator).bfloat16()}
    whole = b"".join(with_tensors(file, {start + 4: changed}, added).parts())
    found = safetensors.torch.load(whole)
    assert torch.equal(found.pop("new"), added["new"])
    numbers = torch.cat([tensor.flatten() for tensor in tensors.values()])
    numbers[1:500_001] = changed
    assert torch.equal(torch.cat([found[key].flatten() for key in sorted(found)]), numbers)
    originals = [(start + 4, data[start + 4 : start + 4 + changed.nbytes])]
    assert b"".join(without_tensors(InMemoryFile(whole), data[:start], originals).parts()) == data
