"""What relocking a checkpoint writes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import fastlock


def relocked_bytes(checkpoint: Path, lock: fastlock.Lock, strength: float) -> int:
    """The bytes of all files that are new; the others are links. It is relocked beside itself, where links can be."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as directory:
        out = Path(directory) / "relocked"
        fastlock.relock_checkpoint(checkpoint, lock, out, strength, stacks=["transformers"])
        stats = [path.stat() for path in out.rglob("*") if path.is_file()]
        return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
