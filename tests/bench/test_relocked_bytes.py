"""What relocking a checkpoint writes, as the benchmarks count it."""

from __future__ import annotations

from pathlib import Path

import fastlock
from bench.lib.relocked_bytes import relocked_bytes
from tests.helpers.families import random_lock, tiny_model


def test_links_are_not_counted_and_nothing_is_left(tmp_path: Path) -> None:
    model, source = tiny_model("llama"), tmp_path / "source"
    model.save_pretrained(source)
    lock = random_lock(model)
    found = relocked_bytes(source, lock, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 1.0, stacks=["transformers"])
    shared = {path.stat().st_ino for path in source.iterdir()}
    new = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_ino not in shared]
    assert found == sum(len(path.read_bytes()) for path in new)
    assert 0 < found < (source / "model.safetensors").stat().st_size
