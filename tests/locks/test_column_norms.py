"""The column norms that a lock may carry of its base: in memory, and in a file of the second version."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastlock.errors import DamagedError, FastlockError
from fastlock.locks.lock import Lock
from tests.locks.test_lock import make, second_reader

NORMS = np.random.default_rng(5).uniform(0, 9, (3, 6)).astype(np.float32)


def test_a_lock_without_them_is_written_as_ever(tmp_path: Path) -> None:
    make().save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert second_reader(data)[1]["format_version"] == "1"
    assert b"column_norms" not in data


def test_they_come_back_and_change_nothing_else(tmp_path: Path) -> None:
    lock = make(column_norms=NORMS)
    lock.save(tmp_path / "a.safetensors")
    back = Lock.load(tmp_path / "a.safetensors")
    assert back.column_norms.dtype == torch.float32
    assert back.column_norms.numpy().tobytes() == NORMS.tobytes()
    assert lock.digest == back.digest == make().digest
    assert lock == make()
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert replace(lock, strength=2.0).column_norms is not None


def test_the_file_is_as_the_format_says(tmp_path: Path) -> None:
    """Read with struct, json and numpy alone, as docs/lock-format.md says."""
    make(column_norms=NORMS).save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert metadata["format_version"] == "2"
    assert header["column_norms"] == {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]}
    assert header["directions"]["data_offsets"] == [72, 144]
    body = data[8 + size :]
    norms = np.frombuffer(body[:72], "<f4").reshape(3, 6)
    assert norms.tobytes() == NORMS.tobytes()
    lock = make()
    order = np.lexsort((lock.heads.numpy(), lock.layers.numpy()))
    assert not (order == np.arange(3)).all(), "or the order of the digest is not tested"
    assert metadata["column_norms_digest"] == hashlib.sha256(norms[order].tobytes()).hexdigest()
    tensors = safetensors.torch.load(data)
    assert safetensors.torch.save(tensors, {k: str(v) for k, v in metadata.items()})[-len(body) :] == body


def test_they_are_given_by_layer_with_heads_ascending() -> None:
    lock = make(layers=[5, 2, 5], heads=[3, 0, 1], column_norms=NORMS)
    norms = lock.norms_by_layer()
    assert norms.keys() == {2, 5}
    assert norms[5].tolist() == NORMS[[2, 0]].tolist()
    assert norms[2].tolist() == NORMS[[1]].tolist()
    assert lock.displacement(1.0)[5].heads == (1, 3)
    assert make().norms_by_layer() == {}


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (NORMS[:2], r"`column_norms` is \[2, 6\], but must be \[K, head_dim\]"),
        (NORMS[:, :5], r"`column_norms` is \[3, 5\]"),
        (NORMS[0], r"`column_norms` is \[6\]"),
        (-NORMS, "row 0 .* has a column norm that is negative, NaN or infinite"),
        (np.where(np.equal(NORMS, NORMS[1, 2]), np.nan, NORMS), "row 1 .* has a column norm"),
        (np.where(np.equal(NORMS, NORMS[2, 2]), np.inf, NORMS), "row 2 .* has a column norm"),
    ],
)
def test_norms_that_cannot_be_are_refused(norms: np.ndarray, message: str) -> None:
    with pytest.raises(FastlockError, match=message):
        make(column_norms=norms)


def written(directory: Path, change) -> Path:
    """A file of a lock with norms whose header and body were changed."""
    make(column_norms=NORMS).save(directory / "a.safetensors")
    data = (directory / "a.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    change(header, body)
    encoded = json.dumps(header).encode()
    (directory / "a.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    return directory / "a.safetensors"


def test_a_flipped_bit_in_them_is_noticed(tmp_path: Path) -> None:
    def flip(_header: dict, body: bytearray) -> None:
        body[40] ^= 1

    with pytest.raises(DamagedError, match="its column_norms do not match its digest"):
        Lock.load(written(tmp_path, flip))


def test_a_digest_of_norms_that_are_gone_is_noticed(tmp_path: Path) -> None:
    make().save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["column_norms_digest"] = "0" * 64
    encoded = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])
    with pytest.raises(DamagedError, match="do not match its digest"):
        Lock.load(tmp_path / "a.safetensors")


def test_the_first_version_has_no_place_for_them(tmp_path: Path) -> None:
    def older(header: dict, _body: bytearray) -> None:
        header["__metadata__"]["format_version"] = "1"

    with pytest.raises(DamagedError, match="a lock holds layers, heads, directions, scales; this file holds column_n"):
        Lock.load(written(tmp_path, older))


def test_the_second_version_has_a_place_for_nothing_else(tmp_path: Path) -> None:
    def renamed(header: dict, _body: bytearray) -> None:
        header["row_norms"] = header.pop("column_norms")

    with pytest.raises(DamagedError, match="and may hold column_norms; this file holds .*row_norms"):
        Lock.load(written(tmp_path, renamed))


def test_norms_in_another_dtype_are_refused(tmp_path: Path) -> None:
    def other(header: dict, _body: bytearray) -> None:
        header["column_norms"]["dtype"] = "I32"

    with pytest.raises(DamagedError, match=r"`column_norms` is torch.int32, but should be torch.float32"):
        Lock.load(written(tmp_path, other))
