"""The Lock: its checks, its file and its displacement."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.locks import lock_checks, lock_file
from fastlock.locks.lock import Lock, check_strength, strength_for
from tests.helpers.released import LOCKS, needs_released

pytestmark = pytest.mark.filterwarnings("error")

GEOMETRY = {"num_layers": 8, "num_heads": 4, "head_dim": 6, "hidden_size": 24}
PROVENANCE = {"base_model": "org/Basis-7B é", "recipe": 'a "quoted"\nline', "extraction_digest": "ab" * 32}


def rows(k: int = 3, head_dim: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((k, head_dim))
    places = rng.permutation(32)[:k]
    return {
        "layers": (places // 4).astype(np.int32),
        "heads": (places % 4).astype(np.int32),
        "directions": (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32),
        "scales": rng.uniform(0.1, 3, k).astype(np.float32),
    }


def make(**changes: Any) -> Lock:
    return Lock(**{**rows(), **GEOMETRY, **PROVENANCE, **changes})


# ---- A second reader and writer, from docs/lock-format.md alone: struct, json and numpy. ----

DTYPES = {"F32": "<f4", "I32": "<i4"}
NAMES = {"layers": "I32", "heads": "I32", "directions": "F32", "scales": "F32"}


def second_reader(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    (size,) = struct.unpack_from("<Q", data)
    assert size <= 2**20 <= 2**26 >= len(data)
    header = json.loads(data[8 : 8 + size].decode("utf-8"))
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["format_version"]) == ("fastlock-lock", "1")
    assert header.keys() == NAMES.keys()
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert entry["dtype"] == NAMES[name]
        tensors[name] = np.frombuffer(data[8 + size :][begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    k, head_dim = tensors["directions"].shape
    assert all(tensors[name].shape == (k,) for name in ("layers", "heads", "scales"))
    assert np.isfinite(tensors["directions"]).all()
    assert (np.abs(np.linalg.norm(tensors["directions"].astype("f8"), axis=1) - 1) <= 2e-3).all()
    assert np.isfinite(tensors["scales"]).all()
    assert (tensors["scales"] > 0).all()
    assert (tensors["layers"] >= 0).all()
    assert (tensors["heads"] >= 0).all()
    assert len({*zip(tensors["layers"].tolist(), tensors["heads"].tolist(), strict=True)}) == k
    assert int(metadata["head_dim"]) == head_dim
    assert metadata["lock_digest"] == second_digest(tensors)
    return tensors, metadata


def second_digest(tensors: dict[str, np.ndarray]) -> str:
    k, head_dim = tensors["directions"].shape
    order = np.lexsort((tensors["heads"], tensors["layers"]))
    recipe = f"fastlock-lock\n{k} {head_dim}\n".encode("ascii")
    recipe += b"".join(tensors[name][order].tobytes() for name in ("layers", "heads", "directions", "scales"))
    return hashlib.sha256(recipe).hexdigest()


def file_bytes(header: bytes | dict[str, Any], body: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def lock_bytes(metadata: dict[str, str] | None = None, **tensors: Any) -> bytes:
    """A lock file of these tensors, however wrong; metadata without a digest unless one is given."""
    codes = {"float32": "F32", "int32": "I32", "float16": "F16", "int64": "I64", "float64": "F64", "uint8": "U8"}
    header: dict[str, Any] = {"__metadata__": {"format": "fastlock-lock", "format_version": "1", **(metadata or {})}}
    body = b""
    for name, value in {**rows(), **tensors}.items():
        if value is not None:
            array = np.ascontiguousarray(value)
            header[name] = {"dtype": codes[array.dtype.name], "shape": list(array.shape)}
            header[name]["data_offsets"] = [len(body), len(body) + array.nbytes]
            body += array.tobytes()
    return file_bytes(header, body)


def assert_same_rows(a: Lock, b: Lock) -> None:
    for name in NAMES:
        assert getattr(a, name).dtype == getattr(b, name).dtype
        assert getattr(a, name).numpy().tobytes() == getattr(b, name).numpy().tobytes(), name
        assert getattr(a, name).shape == getattr(b, name).shape


# ---- Saving and loading ----


def test_a_saved_lock_comes_back_whole(tmp_path: Path) -> None:
    lock = make()
    lock.save(tmp_path / "a.safetensors")
    back = Lock.load(tmp_path / "a.safetensors")
    assert_same_rows(lock, back)
    assert back == lock
    assert hash(back) == hash(lock)
    for name, value in {**GEOMETRY, **PROVENANCE}.items():
        assert getattr(back, name) == value
    assert back.source == str(tmp_path / "a.safetensors")
    assert "3 heads" in repr(back)
    assert lock.digest[:12] in repr(back)
    assert len(back) == 3


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    make().save(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.safelock")
    assert Lock.load(tmp_path / "a.safelock") == make()


def test_a_lock_without_geometry_or_provenance(tmp_path: Path) -> None:
    Lock(**rows()).save(tmp_path / "a.safetensors")
    back = Lock.load(tmp_path / "a.safetensors")
    assert (back.num_layers, back.num_heads, back.head_dim, back.hidden_size) == (None, None, 6, None)
    assert (back.base_model, back.recipe, back.extraction_digest) == (None, None, None)
    assert back.fastlock_version is not None


def test_the_second_reader_agrees(tmp_path: Path) -> None:
    lock = make()
    lock.save(tmp_path / "a.safetensors")
    tensors, metadata = second_reader((tmp_path / "a.safetensors").read_bytes())
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, getattr(lock, name).numpy(), strict=True)
    assert metadata["lock_digest"] == lock.digest
    assert {name: metadata[name] for name in GEOMETRY} == {name: str(value) for name, value in GEOMETRY.items()}
    assert {name: metadata[name] for name in PROVENANCE} == PROVENANCE


@needs_released
@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_the_second_reader_agrees_on_released_locks(path: Path, tmp_path: Path) -> None:
    lock = Lock.load(path)
    lock.save(tmp_path / "a.safetensors")
    tensors, metadata = second_reader((tmp_path / "a.safetensors").read_bytes())
    assert metadata["recipe"] == "safetylock"
    assert_same_rows(lock, Lock(**tensors))


def test_the_bytes_are_canonical(tmp_path: Path) -> None:
    lock = make(fastlock_version="0.9")
    lock.save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    assert size % 8 == 0
    metadata = {"format": "fastlock-lock", "format_version": "1", "lock_digest": lock.digest, "fastlock_version": "0.9"}
    metadata |= {name: str(value) for name, value in GEOMETRY.items()} | PROVENANCE
    expected: dict[str, Any] = {"__metadata__": metadata}
    layout = [("directions", "F32", [3, 6], 72), ("scales", "F32", [3], 12), ("heads", "I32", [3], 12)]
    offset = 0
    for name, dtype, shape, nbytes in [*layout, ("layers", "I32", [3], 12)]:
        expected[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    canonical = json.dumps(expected, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert data[8 : 8 + size] == canonical.ljust(size)
    assert size - len(canonical) < 8
    assert len(data) == 8 + size + offset


def test_the_data_lies_as_the_safetensors_library_lays_it(tmp_path: Path) -> None:
    lock = make()
    lock.save(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    theirs = safetensors.torch.save({name: getattr(lock, name) for name in NAMES})
    (size,), (their_size,) = struct.unpack_from("<Q", data), struct.unpack_from("<Q", theirs)
    assert data[8 + size :] == theirs[8 + their_size :]
    header, their_header = json.loads(data[8 : 8 + size]), json.loads(theirs[8 : 8 + their_size])
    del header["__metadata__"]
    assert header == their_header
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("layers"), lock.layers)


def test_the_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    make().save(tmp_path / "a.safetensors")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from tests.locks import test_lock\n"
        "test_lock.Lock.load(sys.argv[1] + '/a.safetensors').save(sys.argv[1] + '/b.safetensors')\n"
        "test_lock.make().save(sys.argv[1] + '/c.safetensors')\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, tmp_path, Path(__file__).parents[2]], env=environment, check=True)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == data
    assert (tmp_path / "c.safetensors").read_bytes() == data


text = st.none() | st.text(st.characters(codec="utf-8"), max_size=20)
index = st.integers(0, 2**31 - 1)


@st.composite
def locks(draw: st.DrawFn) -> Lock:
    places = draw(st.lists(st.tuples(index, index), min_size=1, max_size=6, unique=True))
    head_dim = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    directions = rng.standard_normal((len(places), head_dim))
    positive = st.floats(min_value=2**-149, max_value=float(np.finfo("f4").max), width=32)
    return Lock(
        layers=[layer for layer, _ in places],
        heads=[head for _, head in places],
        directions=directions / np.linalg.norm(directions, axis=1, keepdims=True),
        scales=draw(st.lists(positive, min_size=len(places), max_size=len(places))),
        hidden_size=draw(st.none() | st.integers(1, 2**31 - 1)),
        base_model=draw(text),
        recipe=draw(text),
        extraction_digest=draw(text),
        fastlock_version=draw(text),
    )


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lock=locks())
def test_any_lock_round_trips(tmp_path: Path, lock: Lock) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lock.save(first)
    back = Lock.load(first)
    assert_same_rows(lock, back)
    assert back.digest == lock.digest
    for name in ("hidden_size", "base_model", "recipe", "extraction_digest"):
        assert getattr(back, name) == getattr(lock, name)
    back.save(second)
    assert second.read_bytes() == first.read_bytes()
    assert second_reader(first.read_bytes())[1]["lock_digest"] == lock.digest


# ---- Every check names the file, the row and the remedy ----


def unit(norm: float = 1.0) -> np.ndarray:
    directions = rows()["directions"]
    directions[1] *= norm
    return directions


def with_row_1(name: str, value: float) -> np.ndarray:
    array = rows()[name]
    array[1] = value
    return array


def with_number(value: float) -> np.ndarray:
    directions = rows()["directions"]
    directions[1, 4] = value
    return directions


ROW = f"row 1 (layer {rows()['layers'][1]}, head {rows()['heads'][1]})"
TWICE = {"layers": np.int32([5, 2, 5]), "heads": np.int32([1, 1, 1])}
BEYOND = {"layers": np.int32([0, 7, 1])}

BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, str], list[str]]] = {
    "NaN direction": ({"directions": with_number(math.nan)}, {}, [ROW, "NaN or infinite numbers", "download it again"]),
    "infinite direction": ({"directions": with_number(-math.inf)}, {}, [ROW, "NaN or infinite", "download it again"]),
    "too long": ({"directions": unit(1.01)}, {}, [ROW, "not a unit vector", "Divide it by its norm"]),
    "too short": ({"directions": unit(0.99)}, {}, [ROW, "not a unit vector", "Divide it by its norm"]),
    "zero direction": ({"directions": unit(0)}, {}, [ROW, "not a unit vector", "Divide it by its norm"]),
    "zero scale": ({"scales": with_row_1("scales", 0)}, {}, [ROW, "scale that is not positive", "download it again"]),
    "negative scale": (
        {"scales": with_row_1("scales", -1)},
        {},
        [ROW, "scale that is not positive", "download it again"],
    ),
    "NaN scale": ({"scales": with_row_1("scales", math.nan)}, {}, [ROW, "NaN or infinite scale", "download it again"]),
    "infinite scale": ({"scales": with_row_1("scales", math.inf)}, {}, [ROW, "NaN or infinite scale", "download it"]),
    "head twice": (TWICE, {}, ["row 2 (layer 5, head 1)", "appears twice", "remove one of the rows"]),
    "negative layer": (
        {"layers": with_row_1("layers", -1)},
        {},
        ["row 1 (layer -1", "negative index", "download it again"],
    ),
    "negative head": ({"heads": with_row_1("heads", -7)}, {}, ["head -7)", "negative index", "download it again"]),
    "beyond the layers": (BEYOND, {"num_layers": "7"}, ["row 1 (layer 7", "beyond the base's 7 layers", "download it"]),
    "beyond the heads": (
        {"layers": np.int32([0, 1, 2]), "heads": np.int32([0, 1, 4])},
        {"num_heads": "4"},
        ["row 2 (layer 2, head 4)", "beyond the base's 4 heads", "download it again"],
    ),
}

BAD_FILES: dict[str, tuple[dict[str, Any], dict[str, str], list[str]]] = {
    "no rows": (
        {
            "layers": np.int32([]),
            "heads": np.int32([]),
            "scales": np.float32([]),
            "directions": np.zeros((0, 6), np.float32),
        },
        {},
        ["at least one row"],
    ),
    "fewer heads": ({"heads": np.int32([1, 2])}, {}, ["disagree", "heads [2]", "Save the lock again"]),
    "fewer scales": ({"scales": np.float32([1, 2])}, {}, ["disagree", "scales [2]", "Save the lock again"]),
    "fewer directions": ({"directions": rows()["directions"][:2]}, {}, ["disagree", "directions [2, 6]"]),
    "flat directions": ({"directions": rows()["directions"].ravel()}, {}, ["disagree", "directions [18]"]),
    "square layers": ({"layers": np.zeros((3, 1), np.int32)}, {}, ["`layers` has shape [3, 1]"]),
    "no numbers": ({"directions": np.zeros((3, 0), np.float32)}, {}, ["directions of 0 numbers"]),
    "float16": (
        {"directions": rows()["directions"].astype("f2")},
        {},
        ["`directions` is torch.float16, but should be", "damaged"],
    ),
    "int64": ({"layers": rows()["layers"].astype("i8")}, {}, ["`layers` is torch.int64, but should be", "damaged"]),
    "float scale": (
        {"scales": rows()["scales"].astype("f8")},
        {},
        ["`scales` is torch.float64, but should be", "damaged"],
    ),
    "missing": (
        {"scales": None},
        {},
        ["a lock holds layers, heads, directions, scales", "this file holds directions", "again"],
    ),
    "one more": (
        {"weights": np.float32([1])},
        {},
        ["this file holds directions, heads, layers, scales, weights", "download it again"],
    ),
    "other head_dim": ({}, {"head_dim": "8"}, ["head_dim is given as 8", "directions have 6", "Save the lock again"]),
    "geometry in words": ({}, {"num_heads": "four"}, ["`num_heads` is 'four'", "positive integer"]),
    "geometry zero": ({}, {"num_heads": "0"}, ["num_heads is 0", "positive integer"]),
    "geometry negative": ({}, {"num_layers": "-1"}, ["`num_layers` is '-1'", "positive integer"]),
    "geometry huge": ({}, {"hidden_size": "9" * 10}, ["hidden_size is 9999999999", "positive integer"]),
    "geometry long": ({}, {"hidden_size": "9" * 9999}, ["`hidden_size` is '999", "positive integer"]),
    "geometry superscript": ({}, {"num_layers": "²"}, ["`num_layers` is", "positive integer"]),
    "other format": ({}, {"format": "pt"}, ["not a lock", "Give the lock file, not a checkpoint"]),
    "later version": ({}, {"format_version": "3"}, ["format version '3'", "reads '1' and '2'", "Upgrade fastlock"]),
    "wrong digest": ({}, {"lock_digest": "0" * 64}, ["do not match its digest", "download it again"]),
    "long provenance": ({}, {"recipe": "x" * 20_000}, ["recipe is longer than 16384 characters"]),
}


# All others are damaged. Another file is wanted of the first, another fastlock of the second.
KINDS = {"other format": FastlockError, "later version": UnsupportedError}


@pytest.mark.parametrize("case", [*BAD_ROWS, *BAD_FILES])
def test_a_bad_file_is_refused_by_name_row_and_remedy(case: str, tmp_path: Path) -> None:
    tensors, metadata, expected = {**BAD_ROWS, **BAD_FILES}[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(lock_bytes(metadata, **tensors))
    with pytest.raises(FastlockError) as caught:
        Lock.load(path)
    assert type(caught.value) is KINDS.get(case, DamagedError)
    for part in [str(path), *expected]:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_in_memory(case: str) -> None:
    tensors, metadata, expected = BAD_ROWS[case]
    with pytest.raises(FastlockError) as caught:
        Lock(**{**rows(), **tensors}, **{name: int(value) for name, value in metadata.items()})
    assert type(caught.value) is FastlockError, "an argument is wrong, and no file is damaged"
    for part in ["this lock", *expected]:
        assert part in str(caught.value)


def test_the_base_file_of_these_cases_loads(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(lock_bytes({"num_layers": "8", "num_heads": "4", "unknown": "ignored"}))
    assert Lock.load(tmp_path / "a.safetensors") == Lock(**rows())


@pytest.mark.parametrize("head_dim", [2, 64, 128, 256])
@pytest.mark.parametrize("how", ["rounded to float16", "normalised in float16"])
def test_float16_unit_vectors_are_unit_enough(head_dim: int, how: str) -> None:
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((1000, head_dim))
    if how == "rounded to float16":
        directions = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float16)
    else:
        half = raw.astype(np.float16)
        directions = half / np.sqrt((half * half).sum(axis=1, keepdims=True, dtype=np.float16))
    assert directions.dtype == np.float16
    Lock(layers=np.arange(1000), heads=np.zeros(1000, np.int64), directions=directions, scales=np.ones(1000))


ODD_INPUTS: dict[str, dict[str, Any]] = {
    "None": {"layers": None},
    "a string": {"layers": "abc"},
    "a dictionary": {"layers": {1: 2}},
    "objects": {"layers": np.array([object()] * 3)},
    "ragged": {"directions": [[1.0], [1.0, 0.0], [1.0]]},
    "float layers": {"layers": [1.0, 2.0, 3.0]},
    "complex scales": {"scales": [1j, 1, 1]},
    "beyond int64": {"layers": [2**70, 1, 2]},
    "beyond int32": {"heads": [2**31, 1, 2]},
    "beyond int32, wrapping to 5": {"heads": [2**32 + 5, 1, 2]},
    "unsigned": {"heads": np.array([2**64 - 1, 1, 2], np.uint64)},
    "sparse": {"directions": torch.eye(3).to_sparse()},
    "meta": {"scales": torch.ones(3, device="meta")},
    "a scalar": {"layers": 3},
    "tiny scale": {"scales": [1e-60, 1, 1]},
    "huge scale": {"scales": [1e60, 1, 1]},
    "head_dim 6.0": {"head_dim": 6.0},
    "num_heads True": {"num_heads": True},
    "num_layers as text": {"num_layers": "8"},
    "base_model 5": {"base_model": 5},
    "lone surrogate": {"base_model": "\ud800"},
    "bytes": {"recipe": b"recipe"},
    "long recipe": {"recipe": "x" * 16_385},
}


@pytest.mark.parametrize("case", ODD_INPUTS)
def test_odd_inputs_are_refused(case: str) -> None:
    with pytest.raises(FastlockError, match="this lock"):
        make(**ODD_INPUTS[case])


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(FastlockError, match="not a tensor of numbers"):
        make(layers=endless)


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_checks, "MAX_HEADS", 2)
    with pytest.raises(FastlockError, match="3 rows; a lock has at most 2"):
        make()
    with pytest.raises(FastlockError, match="directions of 8193 numbers"):
        Lock(layers=[0], heads=[0], directions=torch.eye(1, 8193), scales=[1.0])


def test_the_lock_keeps_its_own_copy() -> None:
    read_only = rows()["scales"]
    read_only.flags.writeable = False
    make(scales=read_only)
    scales = torch.ones(3, dtype=torch.float32, requires_grad=True)
    lock = make(scales=scales)
    with torch.no_grad():
        scales.zero_()
    assert lock.scales.tolist() == [1, 1, 1]
    assert not lock.scales.requires_grad


# ---- Files that are not there, not locks, or made to do harm ----


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FastlockError, match=r"no\.safetensors: does not exist"):
        Lock.load(tmp_path / "no.safetensors")
    with pytest.raises(FastlockError, match="is a directory"):
        Lock.load(tmp_path)
    with pytest.raises(FastlockError, match=r"does not exist|cannot be read"):
        Lock.load("no\0lock")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FastlockError, match="not a regular file"):
        Lock.load(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    make().save(path)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FastlockError, match=r"a\.safetensors: cannot be read .*Permission denied"):
        Lock.load(path)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(lock_file.MAX_FILE_BYTES + 1)
    with pytest.raises(FastlockError, match=r"large\.safetensors: larger than 64 MiB"):
        Lock.load(path)


ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
LOCK = {"format": "fastlock-lock", "format_version": "1"}


def four_entries(body: bytes = b"", **changes: Any) -> bytes:
    return file_bytes({"__metadata__": LOCK, **{name: {**ENTRY, **changes} for name in NAMES}}, body)


HOSTILE_FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "three bytes": lambda: b"abc",
    "text": lambda: b"This is no lock at all, only a line of text.\n" * 9,
    "header beyond the end": lambda: struct.pack("<Q", 10**6) + b"{}",
    "header of 2**64 - 1": lambda: b"\xff" * 8 + b"{}",
    "no object": lambda: file_bytes(b"[]"),
    "no JSON": lambda: file_bytes(b"{'a': 1}"),
    "no UTF-8": lambda: file_bytes(b'{"__metadata__":{"format":"\xff"}}'),
    "UTF-16": lambda: file_bytes(json.dumps({"__metadata__": LOCK}).encode("utf-16")),
    "metadata null": lambda: file_bytes({"__metadata__": None}),
    "metadata a list": lambda: file_bytes({"__metadata__": []}),
    "metadata numbers": lambda: file_bytes({**dict.fromkeys(NAMES, 3), "__metadata__": {**LOCK, "num_layers": 3}}),
    "no metadata": lambda: file_bytes({"a": ENTRY}),
    "nested JSON": lambda: file_bytes(b'{"__metadata__":' + b"[" * 10**6),
    "a long number": lambda: file_bytes(b'{"__metadata__":' + b"9" * 10**6 + b"}"),
    "a long version": lambda: file_bytes({"__metadata__": {**LOCK, "format_version": "9" * 10**6}}),
    "a number as version": lambda: file_bytes({"__metadata__": {**LOCK, "format_version": 1}}),
    "entries no objects": lambda: file_bytes({**dict.fromkeys(NAMES, 3), "__metadata__": LOCK}),
    "the same bytes four times": lambda: four_entries(b"1234", shape=[1], data_offsets=[0, 4]),
    "shape beyond int64": lambda: four_entries(shape=[2**64 - 1, 0]),
    "shape beyond uint64": lambda: four_entries(shape=[2**70]),
    "negative shape": lambda: four_entries(shape=[-1]),
    "shape of 40,000 dimensions": lambda: four_entries(shape=[0] * 40_000),
    "a dtype torch lacks": lambda: four_entries(dtype="F4"),
    "a dtype no one knows": lambda: four_entries(dtype="Q9"),
    "offsets beyond the end": lambda: four_entries(shape=[2**40], data_offsets=[0, 2**42]),
    "ten thousand tensors": lambda: file_bytes({"__metadata__": LOCK, **{str(n): ENTRY for n in range(10_000)}}),
    "a million tensors": lambda: file_bytes(b'{"a":0%s}' % (b',"a":0' * 10**6)),
    "64 MiB of noise": lambda: np.random.default_rng(0).bytes(2**26),
    "64 MiB of zeros": lambda: bytes(2**26),
    "64 MiB after a zip's first bytes": lambda: b"PK\x03\x04".ljust(2**26, b"\1"),
    "64 MiB after a pickle's first bytes": lambda: b"\x80\x04".ljust(2**26, b"N"),
    "truncated": lambda: lock_bytes()[:-1],
    "a tail": lambda: lock_bytes() + b"\0",
}


# Sound files of something else: of these it is not said that they are damaged.
NOT_LOCKS = ("metadata null", "metadata a list", "no metadata")
NEWER = ("a long version", "a number as version")


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_files_are_refused_before_much_is_done(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hostile"
    size = path.write_bytes(HOSTILE_FILES[case]())
    parsed: list[int] = []
    declared: list[int] = []
    json_object, load = lock_file.json_object, safetensors.torch.load

    def counted_json(data: bytes) -> dict[str, Any]:
        parsed.append(len(data))
        return json_object(data)

    def counted_load(data: bytes) -> dict[str, torch.Tensor]:
        length = int.from_bytes(data[:8], "little")
        declared.append(len(json.loads(data[8 : 8 + length]).keys() - {"__metadata__"}))
        return load(data)

    with monkeypatch.context() as patched:
        patched.setattr(lock_file, "json_object", counted_json)
        patched.setattr(safetensors.torch, "load", counted_load)
        with pytest.raises(FastlockError) as caught:
            Lock.load(path)
    assert sum(parsed) <= lock_file.MAX_HEADER_BYTES
    assert declared in ([], [len(NAMES)]), "no tensor is made that a lock does not have"
    kinds = dict.fromkeys(NOT_LOCKS, FastlockError) | dict.fromkeys(NEWER, UnsupportedError)
    assert type(caught.value) is kinds.get(case, DamagedError)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    tracemalloc.start()
    try:
        with pytest.raises(FastlockError):
            Lock.load(path)
        assert tracemalloc.get_traced_memory()[1] < size + 64 * 2**20
    finally:
        tracemalloc.stop()
        path.unlink()


# ---- Saving, whole or not at all ----


def test_saving_needs_a_safetensors_name_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FastlockError, match=r"name it a\.safetensors"):
        make().save(tmp_path / "a.safelock")
    with pytest.raises(FastlockError, match=r"a\.safetensors: cannot be written"):
        make().save(tmp_path / "missing" / "a.safetensors")
    with pytest.raises(FastlockError, match="cannot be written"):
        make().save(tmp_path / "a\0.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FastlockError, match="cannot be written"):
        make().save(tmp_path / "folder.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    make().save(path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FastlockError if isinstance(error, OSError) else KeyboardInterrupt):
        make(scales=[1, 2, 3]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    make().save(tmp_path / "a.safetensors")
    make(scales=[1, 2, 3]).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert Lock.load(tmp_path / "a.safetensors").scales.tolist() == [1, 2, 3]


# ---- The digest ----


def test_the_digest_ignores_order_provenance_and_geometry() -> None:
    lock = make()
    order = [2, 0, 1]
    reordered = {name: value[order] for name, value in rows().items()}
    assert Lock(**reordered).digest == lock.digest
    assert Lock(**reordered) == lock
    assert replace(lock, base_model="another", recipe=None, num_layers=99).digest == lock.digest
    assert lock != object()


def test_the_digest_is_fixed_for_ever() -> None:
    lock = Lock(layers=[5, 2, 5], heads=[3, 0, 1], directions=torch.eye(3, 4), scales=[0.5, 1.0, 2.0])
    assert lock.digest == "f79e51c2f71162f2e58fa5b478bef66ba752b3dc772f691ea120da54a7f527ef"


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_sees_every_bit(name: str) -> None:
    seen = {make().digest}
    for row in range(3):
        for bit in range(6 if name in ("directions", "scales") else 3):
            values = rows()
            values["layers"], values["heads"] = np.int32([0, 8, 16]), np.int32([0, 8, 16])
            seen.add(Lock(**values).digest)
            values[name].view(np.int32).reshape(3, -1)[row, -1] ^= 1 << bit
            seen.add(Lock(**values).digest)
    assert len(seen) == 2 + 3 * (6 if name in ("directions", "scales") else 3)


# ---- The displacement ----


def test_the_displacement_is_strength_scale_direction() -> None:
    places = {"layers": [5, 2, 5, 2], "heads": [3, 1, 0, 2]}
    lock = Lock(**places, directions=rows(4)["directions"], scales=rows(4)["scales"])
    strength = 6.1
    displacement = lock.displacement(strength)
    assert list(displacement) == [2, 5]
    assert displacement[2].heads == (1, 2)
    assert displacement[5].heads == (0, 3)
    for row, (layer, head) in enumerate(zip(places["layers"], places["heads"], strict=True)):
        one = displacement[layer]
        values = one.values[one.heads.index(head)]
        assert values.dtype == torch.float64
        for at in range(6):
            assert values[at].item() == pytest.approx(
                strength * float(lock.scales[row]) * float(lock.directions[row, at]), rel=1e-15
            )
    dense = displacement[5].dense(4 * 6)
    assert dense.dtype == torch.float64
    assert dense.shape == (24,)
    assert torch.equal(dense[:6], displacement[5].values[0])
    assert not dense[6:18].any()
    assert torch.equal(dense[18:], displacement[5].values[1])


def test_the_displacement_of_no_strength_is_zero() -> None:
    assert not any(one.values.any() for one in make().displacement(0).values())


@pytest.mark.parametrize("strength", [0, 6, 0.5, 1e30, np.float32(2), np.int64(3), torch.tensor(4.0)])
def test_strengths_that_are_applied(strength: Any) -> None:
    assert check_strength(strength) == float(strength)
    assert isinstance(check_strength(strength), float)


def test_the_calibrated_strength_is_the_default_and_stays_in_the_file(tmp_path: Path) -> None:
    lock = replace(make(), strength=1 / 3, calibration='{"refusals": 0.99}')
    lock.save(tmp_path / "l.safetensors")
    loaded = Lock.load(tmp_path / "l.safetensors")
    assert (loaded.strength, loaded.calibration) == (1 / 3, '{"refusals": 0.99}')
    assert loaded == make()  # neither decides the fold
    assert strength_for(loaded, None) == 1 / 3
    assert strength_for(loaded, 0) == 0
    assert strength_for(make(), None) == 6.0


@pytest.mark.parametrize("strength", [-1.0, math.nan, "much", "inf", True])
def test_a_calibrated_strength_that_cannot_be_applied_is_refused(strength: Any) -> None:
    with pytest.raises(FastlockError, match=r"this lock: its calibrated strength cannot be used"):
        replace(make(), strength=strength)


@pytest.mark.parametrize("strength", ["1_0", " 6 ", "6\n", "\uff16", "+6", "0x6", "nan", "infinity", "", "-1"])
def test_a_strength_in_a_file_is_ascii_decimal(strength: str) -> None:
    with pytest.raises(FastlockError, match=r"its calibrated strength cannot be used"):
        replace(make(), strength=strength)


@pytest.mark.parametrize("strength", [0.0, 1 / 3, 6.0, 1e-300, 1e22])
def test_every_strength_that_is_written_is_read(strength: float, tmp_path: Path) -> None:
    replace(make(), strength=strength).save(tmp_path / "a.safetensors")
    assert Lock.load(tmp_path / "a.safetensors").strength == strength


def test_metadata_that_says_something_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = lock_bytes({"strength": "6"})
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    twice = header.replace(b'"strength": "6"', b'"strength": "60", "strength": "6"')
    assert len(twice) > len(header)
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + len(header) :])
    with pytest.raises(FastlockError, match="it gives 'strength' twice"):
        Lock.load(path)


@pytest.mark.parametrize("strength", [-1, -1e-300, np.float16(-2)])
def test_a_negative_strength_is_refused(strength: float) -> None:
    with pytest.raises(FastlockError, match="restore them and does not do that"):
        make().displacement(strength)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 10**400, 10**9999], ids=range(5))
def test_a_strength_that_is_not_finite_is_refused(strength: float) -> None:
    with pytest.raises(FastlockError, match="must be a finite number"):
        make().displacement(strength)


@pytest.mark.parametrize("strength", ["6", "strong", b"6", None, True, False, 6j, [6], torch.ones(2)])
def test_a_strength_that_is_no_number_is_refused(strength: Any) -> None:
    with pytest.raises(FastlockError, match="must be a number"):
        make().displacement(strength)
