"""Patches of columns: whatever piece of a file is read, what lies between them stays."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from fastlock.storage.byte_columns import ByteColumns
from fastlock.storage.files import with_patches
from fastlock.storage.local import LocalFile
from fastlock.storage.new_directory import create_local_directory

ROWS, ROW, RUN, STARTS, OFFSET = 5, 12, 3, (0, 7), 4


def patch(seed: int, starts: tuple[int, ...] = STARTS) -> tuple[ByteColumns, np.ndarray]:
    new = np.random.default_rng(seed).integers(0, 256, (ROWS, len(starts) * RUN), np.uint8)
    return ByteColumns(str(seed), ROWS, ROW, starts, RUN, lambda: new), new


def expected(data: bytes, *patches: tuple[tuple[int, ...], np.ndarray]) -> bytes:
    """Byte by byte."""
    whole = list(data)
    for starts, new in patches:
        for row in range(ROWS):
            for i, start in enumerate(starts):
                for k in range(RUN):
                    whole[OFFSET + row * ROW + start + k] = int(new[row, i * RUN + k])
    return bytes(whole)


@given(st.integers(0, 70), st.integers(0, 70))
def test_any_piece_of_a_file(start: int, length: int) -> None:
    """Another patch over the first, with other columns, keeps those of the first that are not its own."""
    data = np.random.default_rng(0).integers(0, 256, 70, np.uint8).tobytes()
    (first, of_first), (second, of_second) = patch(1), patch(2, (5,))
    whole = expected(data, (STARTS, of_first), ((5,), of_second))
    piece = with_patches(data[start : start + length], start, [(OFFSET, first), (OFFSET, second)])
    assert piece == whole[start : start + length]


def test_a_file_is_read_viewed_and_copied_with_them(tmp_path) -> None:
    data = np.random.default_rng(3).integers(0, 256, 70, np.uint8).tobytes()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(data)
    columns, new = patch(1)
    file = LocalFile(tmp_path / "source" / "file").patched([(OFFSET, columns), (66, b"ab")])
    whole = expected(data, (STARTS, new))[:66] + b"ab" + data[68:]
    assert file.read(2, 40) == whole[2:42]
    with file.view(30, 20) as view:
        assert bytes(view) == whole[30:50]
    with file.view(68, 2) as view:
        assert bytes(view) == whole[68:]
    with create_local_directory(tmp_path / "out", tmp_path / "source", in_place=False) as directory:
        directory.copy("copy", file)
    assert (tmp_path / "out" / "copy").read_bytes() == whole
    assert (tmp_path / "source" / "file").read_bytes() == data
