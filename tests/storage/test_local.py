"""Ranges of local files, however much of them the system gives at once."""

from __future__ import annotations

import os
import random

import pytest

from fastlock import DamagedError
from fastlock.storage.local import LocalFile


def test_a_range_longer_than_one_read_of_the_system(tmp_path, monkeypatch) -> None:
    """Linux ends a read after 2 GiB, which one tensor may exceed; here it ends after seven bytes."""
    data, whole_read = random.Random(0).randbytes(100), os.pread
    (tmp_path / "file").write_bytes(data)
    file = LocalFile(tmp_path / "file")
    monkeypatch.setattr(os, "pread", lambda fd, length, start: whole_read(fd, min(length, 7), start))
    for start, length in ((0, 100), (3, 7), (3, 8), (0, 6), (95, 5), (40, 0)):
        assert file.read(start, length) == data[start : start + length]
    (tmp_path / "file").write_bytes(data[:60])
    with pytest.raises(DamagedError, match="was changed while it was being read"):
        file.read(50, 20)
