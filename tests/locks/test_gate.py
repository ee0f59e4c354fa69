"""Locks with a gate: what they are, their files, and what is refused."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.locks.lock import Lock, strength_for

LAYERS, HEADS, HEAD_DIM, RANK = [5, 2, 5], [3, 0, 1], 4, 2
RANDOM = np.random.default_rng(0)
READERS, WRITERS = (RANDOM.standard_normal((3, RANK, HEAD_DIM)).astype("<f4") for _ in range(2))
DIRECTIONS, SCALES = np.eye(3, HEAD_DIM, dtype="<f4"), np.array([0.5, 1, 2], "<f4")
NONE = {"directions": np.zeros_like(DIRECTIONS), "scales": np.zeros_like(SCALES)}


def make(**changes: Any) -> Lock:
    rows = {"layers": LAYERS, "heads": HEADS, "directions": DIRECTIONS, "scales": SCALES}
    return Lock(**{**rows, "readers": READERS, "writers": WRITERS, **changes})


def changed_file(lock: Lock, path: Path, change: Any) -> Path:
    """The lock's file after a change of its header (a dict) and its body."""
    lock.save(path)
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    change(header, body)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    return path


def test_the_digest_is_what_the_format_says() -> None:
    order = [1, 2, 0]  # by layer and head
    data = b"fastlock-lock\n3 4 2\n" + np.array([2, 5, 5], "<i4").tobytes() + np.array([0, 1, 3], "<i4").tobytes()
    data += b"".join(rows[order].tobytes() for rows in (DIRECTIONS, SCALES, READERS, WRITERS))
    assert make().digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["readers", "writers"])
def test_the_digest_sees_every_bit_of_a_gate(name: str) -> None:
    seen = {make().digest, make(readers=None, writers=None).digest}
    rows = {"readers": READERS, "writers": WRITERS}[name]
    for i in range(rows.size):
        other = rows.copy()
        other.view(np.int32).flat[i] ^= 1
        seen.add(make(**{name: other}).digest)
    assert len(seen) == rows.size + 2


def test_a_gate_comes_back_from_its_file(tmp_path: Path) -> None:
    norms = np.abs(RANDOM.standard_normal((3, HEAD_DIM)))
    lock = make(column_norms=norms, base_model="base")
    lock.save(tmp_path / "a.safetensors")
    again = Lock.load(tmp_path / "a.safetensors")
    assert again == lock
    assert torch.equal(again.readers, torch.from_numpy(READERS))
    assert torch.equal(again.writers, torch.from_numpy(WRITERS))
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_acts_is_given_by_layer_with_heads_ascending() -> None:
    gates = make().gates(1.5)
    assert gates.keys() == {2, 5}
    assert gates[5].heads == (1, 3)
    assert gates[5].readers.tolist() == READERS[[2, 0]].transpose(1, 0, 2).tolist()
    assert gates[5].writers.tolist() == (1.5 * WRITERS[[2, 0]].astype(float)).transpose(1, 0, 2).tolist()
    v, u = gates[5].dense(5 * HEAD_DIM)
    assert v.shape == u.shape == (20, RANK)
    assert v[4:8].T.tolist() == READERS[2].tolist()
    assert v[12:16].T.tolist() == READERS[0].tolist()
    assert not v[:4].any()
    assert not u[8:12].any()
    assert make(readers=None, writers=None).gates(1.0) == {}


def test_the_constant_part_is_kept_beside_it() -> None:
    lock = make()
    assert (lock.rank, lock.has_constant) == (RANK, True)
    assert lock.constant(2.0)[2].values.tolist() == [[0, 2, 0, 0]]
    alone = make(**NONE)
    assert (alone.rank, alone.has_constant) == (RANK, False)
    assert not any(of_layer.values.any() for of_layer in alone.constant(2.0).values())


def test_whoever_folds_a_bias_alone_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="has a gate, which goes into weights"):
        make().displacement(1.0)


def test_a_gate_acts_at_strength_1_by_default() -> None:
    assert strength_for(make(), None) == 1
    assert strength_for(make(strength=0.5), None) == 0.5
    assert strength_for(make(readers=None, writers=None), None) == 6


def test_a_negative_strength_is_refused() -> None:
    for part in (make().gates, make().constant):
        with pytest.raises(FastlockError, match="a negative strength would push"):
            part(-1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readers": None}, "it has `writers`, but no `readers`"),
        ({"writers": None}, "it has `readers`, but no `writers`"),
        ({"readers": READERS[:, :1]}, r"`readers` is \[3, 1, 4\] and `writers` \[3, 2, 4\]"),
        ({"readers": READERS[:2], "writers": WRITERS[:2]}, r"here \[3, rank, 4\]"),
        ({"readers": READERS[..., :3], "writers": WRITERS[..., :3]}, r"here \[3, rank, 4\]"),
        ({"readers": READERS[:, 0], "writers": WRITERS[:, 0]}, r"here \[3, rank, 4\]"),
        ({"readers": READERS[:, :0], "writers": WRITERS[:, :0]}, "a gate of rank 0"),
        ({"readers": np.zeros((3, 257, 4)), "writers": np.zeros((3, 257, 4))}, "a gate of rank 257"),
        ({"readers": np.where(READERS[1, 0, 2] == READERS, np.nan, READERS)}, "row 1 .* has a reader with NaN"),
        ({"writers": np.where(WRITERS[2, 1, 3] == WRITERS, np.inf, WRITERS)}, "row 2 .* has a writer with NaN"),
        ({"scales": [0.5, 0, 2]}, "row 1 .* has a scale that is not positive"),
        ({"directions": DIRECTIONS * [[1], [0], [1]]}, "row 1 .* has a direction that is not a unit vector"),
        ({"readers": None, "writers": None, **NONE}, "row 0 .* has a scale that is not positive"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FastlockError, match=message):
        make(**changes)


def test_rows_without_a_constant_part_may_stand_beside_others() -> None:
    mixed = make(directions=DIRECTIONS * [[1], [0], [1]], scales=[0.5, 0, 2])
    assert mixed.has_constant
    assert mixed.constant(1.0)[2].values.tolist() == [[0, 0, 0, 0]]


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    def flip(header: dict[str, Any], body: bytearray) -> None:
        body[header["readers"]["data_offsets"][0] + 5] ^= 1

    with pytest.raises(DamagedError, match="its rows do not match its digest"):
        Lock.load(changed_file(make(), tmp_path / "a.safetensors", flip))


def test_the_first_version_has_no_place_for_a_gate(tmp_path: Path) -> None:
    def older(header: dict[str, Any], _body: bytearray) -> None:
        assert header["__metadata__"]["format_version"] == "2"
        header["__metadata__"]["format_version"] = "1"

    with pytest.raises(DamagedError, match="this file holds .*readers"):
        Lock.load(changed_file(make(), tmp_path / "a.safetensors", older))


def test_half_a_gate_in_a_file_is_refused(tmp_path: Path) -> None:
    def without(header: dict[str, Any], _body: bytearray) -> None:
        header["column_norms"] = header.pop("writers")
        header["column_norms"]["shape"] = [3, RANK * HEAD_DIM]

    with pytest.raises(DamagedError, match="it has `readers`, but no `writers`"):
        Lock.load(changed_file(make(), tmp_path / "a.safetensors", without))
