"""The reader of released `.safelock` files: it reads what such files hold, and runs nothing of what they say."""

from __future__ import annotations

import bz2
import copyreg
import io
import os
import pickle
import pickletools
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlock.errors import DamagedError, FastlockError
from fastlock.locks import safelock
from fastlock.locks.lock import Lock
from tests.helpers.released import LLAMA_8B, LOCKS, needs_released

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),  # pickletools', on STRING
]

KEY = "model.layers.{}.self_attn.head_out"
CORE: Any = getattr(np, "_core", None) or np.core
SPELLINGS = ("numpy.core", "numpy._core")


def unit(seed: int = 0, head_dim: int = 8) -> np.ndarray:
    direction = np.random.default_rng(seed).standard_normal(head_dim)
    return direction / np.linalg.norm(direction)


def entry(head: int = 3, seed: int = 0) -> tuple[Any, ...]:
    return np.int64(head), unit(seed).astype(np.float16), np.float16(0.5 + seed)


def lock_value() -> dict[str, Any]:
    return {KEY.format(12): [entry(3, 0), entry(0, 1)], KEY.format(7): [entry(31, 2)]}


def respelled(pickled: bytes, spelling: str) -> bytes:
    """The same pickle as NumPy 1 ("numpy.core") or NumPy 2 ("numpy._core") would write it."""
    if pickled[2:3] == b"\x95":  # a FRAME holds a length; frames are optional
        pickled = pickled[:2] + pickled[11:]
    for written in SPELLINGS:
        for name in (".multiarray", ".numeric"):
            old, new = (written + name).encode(), (spelling + name).encode()
            pickled = pickled.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            pickled = pickled.replace(bytes([0x8C, len(old)]) + old, bytes([0x8C, len(new)]) + new)
    return pickled


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED, name: str = "archive/data.pkl") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(zipfile.ZipInfo(name), pickled, method)
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
    return buffer.getvalue()


def load(data: bytes, tmp_path: Path) -> Lock:
    path = tmp_path / "a.safelock"
    path.write_bytes(data)
    return Lock.load(path)


def assert_is_the_lock(lock: Lock) -> None:
    assert lock.layers.tolist() == [12, 12, 7]
    assert lock.heads.tolist() == [3, 0, 31]
    expected = np.stack([unit(seed).astype(np.float16).astype(np.float32) for seed in range(3)])
    assert lock.directions.numpy().tobytes() == expected.tobytes()
    assert lock.scales.tolist() == [0.5, 1.5, 2.5]
    assert (lock.recipe, lock.num_layers, lock.head_dim) == ("safetylock", None, 8)


# ---- What released files hold ----


class Oracle(pickle.Unpickler):
    """Python's own unpickler, let near nothing but the five globals of a released lock."""

    def find_class(self, module: str, name: str) -> Any:
        return {
            ("numpy", "dtype"): np.dtype,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy.core.multiarray", "_reconstruct"): CORE.multiarray._reconstruct,
            ("numpy.core.multiarray", "scalar"): CORE.multiarray.scalar,
            ("_codecs", "encode"): lambda text, codec: text.encode(codec),
        }[module, name]


@needs_released
@pytest.mark.parametrize(("path", "k"), [*zip(LOCKS, (24, 48, 24), strict=True)], ids=[path.stem for path in LOCKS])
def test_a_released_lock_loads_exactly(path: Path, k: int) -> None:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        value = Oracle(io.BytesIO(archive.read(name))).load()
    truth = [(int(key.split(".")[2]), *row) for key, rows in value.items() for row in rows]
    lock = Lock.load(path)
    assert len(lock) == len(truth) == k
    assert lock.layers.tolist() == [layer for layer, *_ in truth]
    assert lock.heads.tolist() == [int(head) for _, head, *_ in truth]
    directions = np.stack([direction for _, _, direction, _ in truth])
    assert directions.dtype == np.float16
    assert lock.directions.dtype == torch.float32
    assert lock.directions.numpy().tobytes() == directions.astype(np.float32).tobytes()
    assert lock.scales.tolist() == [float(sigma) for *_, sigma in truth]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", ["pickle", "stored", "deflated"])
def test_a_lock_of_any_protocol_and_numpy(container: str, protocol: int, spelling: str, tmp_path: Path) -> None:
    data = respelled(pickle.dumps(lock_value(), protocol), spelling)
    assert spelling.encode() in data
    if container != "pickle":
        data = zipped(data, zipfile.ZIP_DEFLATED if container == "deflated" else zipfile.ZIP_STORED)
    assert_is_the_lock(load(data, tmp_path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_what_torch_save_writes(zip_format: bool, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safelock"
    torch.save(lock_value(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    assert zipfile.is_zipfile(path) == zip_format
    assert_is_the_lock(Lock.load(path))


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("number", [np.int64, np.uint8, np.int32, int, lambda n: np.array(n, ">i4")])
def test_any_width_of_number(number: Callable[[int], Any], dtype: str, tmp_path: Path) -> None:
    rows = [(number(5), unit(0).astype(dtype), np.dtype(dtype).type(0.25)), (number(6), unit(1).astype(dtype), 0.5)]
    rows.append((number(7), unit(2).astype(dtype), 2))
    lock = load(pickle.dumps({KEY.format(0): rows}, 2), tmp_path)
    expected = np.stack([unit(seed).astype(dtype).astype(np.float32) for seed in range(3)])
    assert lock.directions.numpy().tobytes() == expected.tobytes()
    assert lock.heads.tolist() == [5, 6, 7]
    assert lock.scales.tolist() == [0.25, 0.5, 2.0]


def test_every_head_of_a_large_base_loads(tmp_path: Path) -> None:
    directions = np.random.default_rng(0).standard_normal((5120, 128))
    directions = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float16)
    rows = [(np.int64(at % 64), directions[at], np.float16(1)) for at in range(5120)]
    value = {KEY.format(layer): rows[64 * layer : 64 * layer + 64] for layer in range(80)}
    lock = load(zipped(pickle.dumps(value, 2)), tmp_path)
    assert lock.directions.numpy().tobytes() == directions.astype(np.float32).tobytes()
    assert lock.layers.tolist() == [at // 64 for at in range(5120)]


# ---- What is no lock: the message says where and what to do ----

NO_LOCKS: dict[str, tuple[Any, str]] = {
    "a list": ([entry()], "not a lock"),
    "a number": (3, "not a lock"),
    "empty": ({}, "holds no locked head"),
    "empty layers": ({KEY.format(1): [], KEY.format(2): []}, "holds no locked head"),
    "another key": ({"model.layers.1.mlp": [entry()]}, "found 'model.layers.1.mlp' where"),
    "a key and more": ({KEY.format(1) + "\n": [entry()]}, "not a lock"),
    "Arabic digits": ({KEY.format("\u0663"): [entry()]}, "not a lock"),
    "a negative layer": ({KEY.format(-1): [entry()]}, "not a lock"),
    "a layer of 7 digits": ({KEY.format(10**6): [entry()]}, "not a lock"),
    "a long key": ({"k" * 10**6: [entry()]}, "not a lock"),
    "a lone surrogate": ({"\ud800": [entry()]}, "not a lock"),
    "rows in a dictionary": ({KEY.format(1): {"a": entry()}}, "head_out' is not a list of heads"),
    "two numbers a row": ({KEY.format(1): [entry(), entry()[:2]]}, r"row 1 \(layer 1\) is not \(head, direction"),
    "four numbers a row": ({KEY.format(1): [(*entry(), 1)]}, r"row 0 \(layer 1\) is not \(head, direction"),
    "a row no tuple": ({KEY.format(1): ["abc"]}, r"row 0 \(layer 1\) is not \(head, direction"),
    "head a float": (
        {KEY.format(1): [(1.0, *entry()[1:])]},
        r"row 0 \(layer 1\) has a head that is not an index.*again",
    ),
    "head True": ({KEY.format(1): [(True, *entry()[1:])]}, "has a head that is not an index"),
    "head a float32": ({KEY.format(1): [(np.float32(1), *entry()[1:])]}, "has a head that is not an index"),
    "head a vector": ({KEY.format(1): [(np.arange(2), *entry()[1:])]}, "has a head that is not an index"),
    "head negative": ({KEY.format(1): [(np.int8(-1), *entry()[1:])]}, "has a head that is not an index"),
    "head 2**31": ({KEY.format(1): [(2**31, *entry()[1:])]}, "has a head that is not an index"),
    "head 10**6000": ({KEY.format(1): [(10**6000, *entry()[1:])]}, "has a head that is not an index"),
    "scale a string": ({KEY.format(1): [(*entry()[:2], "1")]}, "has a scale that is not a number"),
    "scale None": ({KEY.format(1): [(*entry()[:2], None)]}, "has a scale that is not a number"),
    "scale 10**400": ({KEY.format(1): [(*entry()[:2], 10**400)]}, "has a scale that is not a number"),
    "scale 10**6000": ({KEY.format(1): [(*entry()[:2], -(10**6000))]}, "has a scale that is not a number"),
    "scale 1e300": ({KEY.format(1): [(*entry()[:2], 1e300)]}, r"row 0 \(layer 1, head 3\) has a NaN or infinite scale"),
    "scale np 1e300": ({KEY.format(1): [(*entry()[:2], np.float64(1e300))]}, "NaN or infinite scale"),
    "scale NaN": ({KEY.format(1): [(*entry()[:2], np.float16("nan"))]}, "NaN or infinite scale"),
    "scale 0": ({KEY.format(1): [(*entry()[:2], 0)]}, "scale that is not positive"),
    "a matrix": ({KEY.format(1): [(1, np.eye(2), 1.0)]}, "not a vector of floats"),
    "integers": ({KEY.format(1): [(1, np.arange(4), 1.0)]}, "not a vector of floats"),
    "a list of floats": ({KEY.format(1): [(1, [1.0, 0.0], 1.0)]}, "not a vector of floats"),
    "an empty vector": ({KEY.format(1): [(1, np.zeros(0, "f4"), 1.0)]}, "No lock needs this"),
    "beyond float32": ({KEY.format(1): [(1, np.array([1e300, 1.0]), 1.0)]}, "NaN or infinite numbers"),
    "signalling NaN": (
        {KEY.format(1): [(1, np.array([0x7FF0000000000001, 0], "u8").view("f8"), 1.0)]},
        "NaN or infinite numbers",
    ),
    "not a unit": ({KEY.format(1): [(1, np.ones(4, "f2"), 1.0)]}, "not a unit vector"),
    "two widths": ({KEY.format(1): [entry(), (1, np.eye(1, 4)[0], 1.0)]}, r"row 1 \(layer 1, head 1\).*one head_dim"),
    "a head twice": ({KEY.format(1): [entry(), entry()]}, r"row 1 \(layer 1, head 3\) appears twice"),
    "a head twice, 01": ({KEY.format(1): [entry()], KEY.format("01"): [entry()]}, "appears twice"),
    "a float vector of 8193": ({KEY.format(1): [(1, np.ones(8193, "f2"), 1.0)]}, "more than 8192 numbers"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", NO_LOCKS)
def test_what_is_no_lock_is_refused(case: str, protocol: int, tmp_path: Path) -> None:
    value, message = NO_LOCKS[case]
    with pytest.raises(FastlockError, match=message) as caught:
        load(pickle.dumps(value, protocol), tmp_path)
    assert isinstance(caught.value, DamagedError) == (": not a lock:" not in str(caught.value))
    assert str(caught.value).startswith(str(tmp_path / "a.safelock"))
    assert len(str(caught.value)) < 1000


# ---- Hostile files: within the limits of work and memory, and nothing of them is run ----


MEMORY = 256 * 2**20


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations of pickles that were run."""
    names: list[str] = []
    step = safelock._Reader.step

    def counted(self: Any, name: str, argument: Any) -> None:
        names.append(name)
        step(self, name, argument)

    monkeypatch.setattr(safelock._Reader, "step", counted)
    return names


def assert_refused(data: bytes, tmp_path: Path, operations: list[str], message: str | None = None) -> FastlockError:
    with pytest.raises(FastlockError, match=message) as caught:
        load(data, tmp_path)
    assert len(operations) <= safelock.MAX_OPCODES + 1
    assert len(str(caught.value)) < 1000
    operations.clear()
    tracemalloc.start()
    try:
        with pytest.raises(FastlockError):
            Lock.load(tmp_path / "a.safelock")
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
        operations.clear()
        (tmp_path / "a.safelock").unlink()
    return caught.value


class Trap:
    """Touches the file whose name it is given, when it is made or given a state."""

    def __new__(cls, name: str | None = None) -> Trap:
        if name:
            Path(name).touch()
        return super().__new__(cls)

    def __setstate__(self, name: str) -> None:
        Path(name).touch()


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call_encode(string: str, *arguments: str) -> bytes:
    return b"c_codecs\nencode\n(" + text(string) + b"".join(map(text, arguments)) + b"tR"


def layers_of(first: bytes, again: bytes, count: int) -> bytes:
    """A pickle of many layers: the rows that `first` makes, then, for each other layer, those that `again` makes."""
    return (
        b"\x80\x02}("
        + text(KEY.format(0))
        + first
        + b"".join(text(KEY.format(n)) + again for n in range(1, count))
        + b"u."
    )


TRAP = f"{__name__}\nTrap\n".encode()
ATTACKS: dict[str, Callable[[str], bytes]] = {
    "os.system, GLOBAL": lambda marker: pickle.dumps(Call(os.system, f"touch {marker}"), 2),
    "os.system, STACK_GLOBAL": lambda marker: pickle.dumps(Call(os.system, f"touch {marker}"), 4),
    "eval": lambda marker: pickle.dumps(Call(eval, f"open({marker!r}, 'w').close()"), 3),
    "exec, protocol 5": lambda marker: pickle.dumps(Call(exec, f"open({marker!r}, 'w').close()"), 5),
    "a marker file": lambda marker: pickle.dumps(Call(Path.touch, Path(marker)), 2),
    "INST": lambda marker: b"\x80\x02(" + text(f"touch {marker}") + b"ios\nsystem\n.",
    "OBJ": lambda marker: b"\x80\x02(cos\nsystem\n" + text(f"touch {marker}") + b"o.",
    "NEWOBJ": lambda marker: b"\x80\x02c" + TRAP + text(marker) + b"\x85\x81.",
    "NEWOBJ_EX": lambda marker: b"\x80\x04c" + TRAP + text(marker) + b"\x85}\x92.",
    "BUILD": lambda marker: b"\x80\x02c" + TRAP + b")\x81" + text(marker) + b"b.",
    "EXT1": lambda marker: b"\x80\x02\x82\xf0" + text(f"touch {marker}") + b"\x85R.",
    "EXT2": lambda marker: b"\x80\x02\x83\xf0\0" + text(f"touch {marker}") + b"\x85R.",
    "EXT4": lambda marker: b"\x80\x02\x84\xf0\0\0\0" + text(f"touch {marker}") + b"\x85R.",
    "getattr of a known global": lambda marker: (
        b"\x80\x02c__builtin__\ngetattr\ncos\nsystem\n"
        + text("__call__")
        + b"\x86R"
        + text(f"touch {marker}")
        + b"\x85R."
    ),
}


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension(os.system.__module__, "system", 0xF0)
    yield
    copyreg.remove_extension(os.system.__module__, "system", 0xF0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("place", ["whole", "rows", "head", "zip", "legacy"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_is_run(attack: str, place: str, tmp_path: Path, operations: list[str]) -> None:
    marker = tmp_path / "marker"
    hostile = ATTACKS[attack](str(marker))
    pickle.loads(hostile)
    assert marker.exists(), "the attack must be a real one"
    marker.unlink()
    inner = hostile[2:-1] if hostile[2:3] != b"\x95" else hostile[11:-1]
    key = text(KEY.format(1))
    data = {
        "whole": hostile,
        "rows": b"\x80\x05}" + key + inner + b"s.",
        "head": b"\x80\x05}" + key + b"]" + inner + b"NN\x87as.",
        "zip": zipped(hostile),
        "legacy": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + hostile + hostile,
    }[place]
    message = "No lock needs this.*not executed; download the lock from its authors"
    assert isinstance(assert_refused(data, tmp_path, operations, message), DamagedError)
    assert list(tmp_path.iterdir()) == []


OTHER_GLOBALS = (
    "os system",
    "builtins eval",
    "numpy load",
    "numpy f2py",
    "torch load",
    "numpy.core.multiarray scalar.x",
)


@pytest.mark.parametrize("name", OTHER_GLOBALS)
def test_other_globals_are_refused_by_name(name: str, tmp_path: Path, operations: list[str]) -> None:
    module, attribute = name.split()
    for data in (
        f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1"),
        b"\x80\x04" + text(module) + text(attribute) + b"\x93.",
    ):
        assert_refused(data, tmp_path, operations, f"the global '{name}'")


def keyed(rows: bytes, before: bytes = b"") -> bytes:
    """A pickle of one layer whose rows are what these operations make, after what some others do."""
    return b"\x80\x02" + before + b"}" + text(KEY.format(1)) + rows + b"s."


class Array:
    """Pickles as an array of this state, whatever the state is."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return CORE.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state


def as_direction(value: Any, protocol: int = 3) -> bytes:
    return pickle.dumps({KEY.format(1): [(1, value, 1.0)]}, protocol)


F4 = np.dtype("f4")
LISTS = b"]q\0" + b"]q\1ah\1" * 50_000  # each list is put in the one before while it is still empty
LAUGHS = b"]q\0" + b"".join(b"](" + bytes([0x68, n]) * 10 + bytes([0x65, 0x71, n + 1]) for n in range(30))
MEGABYTE = text("a" * 10**6) + text("latin1")
LENGTH_CODES = {"BINUNICODE8": b"\x8d", "BINBYTES8": b"\x8e", "BYTEARRAY8": b"\x96", "FRAME": b"\x95"}
BAD_SHAPES: list[tuple[Any, ...]] = [(2**40,), (2**62, 4), (-1,), (-1, -1), (2**32, 2**32), (1,) * 33, (), (0,)]
BAD_SHAPES += [(0, 2**62), (1.0,), ("a",)]
ROW_OF_8192 = pickle.dumps((1, np.eye(1, 8192, dtype="f2")[0], 1.0), 2)[2:-1]
DEEP = 100_000

HOSTILE: dict[str, Callable[[], bytes]] = {
    "lists nested deep": lambda: keyed(b"]" * DEEP + b"a" * (DEEP - 1)),
    "lists nested deep, outermost first": lambda: keyed(b"h\0", LISTS),
    "tuples nested deep": lambda: keyed(b")" + b"\x85" * DEEP),
    "tuples nested deep, by marks": lambda: keyed(b"(" * DEEP + b"t" * DEEP),
    "dictionaries nested deep": lambda: keyed((b"}" + text("a")) * DEEP + b"N" + b"s" * DEEP),
    "dtype arguments nested deep": lambda: keyed(b"cnumpy\ndtype\n)" + b"\x85" * DEEP + b"R"),
    "a list that holds itself": lambda: keyed(b"]q\0h\0ah\0ah\0a"),
    "a dictionary that holds itself": lambda: b"\x80\x02}q\0" + text(KEY.format(1)) + b"h\0s.",
    "keys of nested tuples": lambda: b"\x80\x02})" + b"\x85" * DEEP + b"Ns.",
    "keys that are lists": lambda: b"\x80\x02}]Ns.",
    "keys that are marks": lambda: b"\x80\x02}(Ns.",
    "keys that are numbers": lambda: b"\x80\x02}(" + b"K\1N" * 50_000 + b"u.",
    "LONG_BINPUT of 2**32 - 1": lambda: keyed(b"]r\xff\xff\xff\xff"),
    "PUT of 10**4000": lambda: keyed(b"]p" + b"9" * 4000 + b"\n"),
    "PUT of 10**100000": lambda: keyed(b"]p" + b"9" * 100_000 + b"\n"),
    "PUT of -1": lambda: keyed(b"]p-1\n"),
    "GET of nothing": lambda: keyed(b"h\7"),
    "LONG_BINGET of 2**32 - 1": lambda: keyed(b"j\xff\xff\xff\xff"),
    **{
        f"{name} of {length:#x}": lambda code=code, length=length: keyed(code + struct.pack("<Q", length) + b"abc")
        for name, code in LENGTH_CODES.items()
        for length in (2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
    },
    "BINUNICODE of 2**32 - 1": lambda: keyed(b"X\xff\xff\xff\xffabc"),
    "BINBYTES of 2**32 - 1": lambda: keyed(b"B\xff\xff\xff\xffabc"),
    "LONG4 of 2**31 - 1": lambda: keyed(b"\x8b\xff\xff\xff\x7fabc"),
    "LONG4 of -1": lambda: keyed(b"\x8b\xff\xff\xff\xffabc"),
    "a long of 1 MB": lambda: keyed(b"]\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"NN\x87a"),
    "a long of 1 MB as a shape": lambda: keyed(
        pickle.dumps(Array(1, (1 << 8 * 10**6,), F4, False, b""), 3)[2:-1]
    ),
    "a long of a million digits": lambda: keyed(b"L" + b"9" * 10**6 + b"L\n"),
    "an integer of a million digits": lambda: keyed(b"I" + b"9" * 10**6 + b"\n"),
    "no integer": lambda: keyed(b"Iabc\n"),
    "no float": lambda: keyed(b"Fabc\n"),
    "no UTF-8": lambda: keyed(b"X\2\0\0\0\xff\xfe"),
    "no escape": lambda: keyed(b"V\\uD8\n"),
    "a string": lambda: keyed(b"S'abc'\n"),
    "no ASCII in a global": lambda: keyed(b"c\xff\n\xfe\n"),
    "a global of 10 MB": lambda: keyed(b"c" + b"a" * 10**7 + b"\nb\n"),
    "a global of numbers": lambda: keyed(b"K\1K\2\x93"),
    "a persistent id": lambda: keyed(b"Pabc\n"),
    "a persistent id off the stack": lambda: keyed(text("abc") + b"Q"),
    "an out-of-band buffer": lambda: keyed(b"\x97"),
    "a set": lambda: keyed(b"\x8f"),
    "an unknown operation": lambda: keyed(b"\xff"),
    "nothing on the stack": lambda: b"\x80\x02.",
    "a tuple of nothing": lambda: b"\x80\x02\x87.",
    "an append to nothing": lambda: b"\x80\x02Na.",
    "an append to a row": lambda: keyed(b"NNa"),
    "items of nothing": lambda: b"\x80\x02NNNs.",
    "an end without a beginning": lambda: keyed(b"t"),
    "an odd number of items": lambda: b"\x80\x02}(" + text("a") + b"u.",
    "no end": lambda: pickle.dumps(lock_value(), 2)[:-1],
    "only a protocol": lambda: b"\x80\x02",
    "a call of a string": lambda: keyed(text("a") + b")R"),
    "a state for a list": lambda: keyed(b"]Nb"),
    "encode as rot13": lambda: keyed(call_encode("abc", "rot13")),
    "encode with an error handler": lambda: keyed(call_encode("abc", "latin1", "x")),
    "encode what is no latin-1": lambda: keyed(call_encode("\u0416", "latin1")),
    "one string of a megabyte encoded 500 times": lambda: (
        keyed(b"(" + b"h\0h\1R" * 500 + b"l", b"c_codecs\nencode\nq\0" + MEGABYTE + b"\x86q\1")
    ),
    "30 MB of astral text": lambda: b"\x80\x02" + text("\U0001f600" + "a" * 30_000_000) + b".",
    **{
        f"an array of shape {shape}": lambda shape=shape: as_direction(Array(1, shape, F4, False, b"\0\0\x80\x3f"))
        for shape in BAD_SHAPES
    },
    "an array of a million dimensions": lambda: as_direction(Array(1, (1,) * 200_000, F4, False, b"\0\0\x80\x3f")),
    "an array of too few bytes": lambda: as_direction(Array(1, (2,), F4, False, b"\0\0\x80\x3f")),
    "an array of a list of floats": lambda: as_direction(Array(1, (1,), F4, False, [1.0])),
    "an array of a string": lambda: as_direction(Array(1, (1,), F4, False, "abcd")),
    "an array of no dtype": lambda: as_direction(Array(1, (1,), "f4", False, b"\0\0\x80\x3f")),
    "an array of objects": lambda: as_direction(np.array([1.0, None], dtype=object)),
    "an array of objects, as bytes": lambda: as_direction(Array(1, (1,), np.dtype("O"), False, bytes(8))),
    "a structured array": lambda: as_direction(np.zeros(2, [("a", "f2"), ("b", "f2")])),
    "a structured scalar": lambda: as_direction(np.zeros(2, [("a", "f2")])[0]),
    "a subarray dtype": lambda: as_direction(Array(1, (1,), np.dtype(("f4", (2,))), False, bytes(8))),
    **{
        f"an array of {code}": lambda code=code: as_direction(np.zeros(2, code))
        for code in ("M8[s]", "U3", "S3", "c16", "?", "V4")
    },
    "a buffer of a huge shape": lambda: as_direction(np.ones(4, "f4"), 5).replace(b"K\4\x85", b"J\xff\xff\xff\x7f\x85"),
    "a subclass of array": lambda: as_direction(Call(CORE.multiarray._reconstruct, np.matrix, (0,), b"b")),
    "as many dictionaries as operations": lambda: b"\x80\x02" + b"}" * 399_998 + b".",
    "4 million lists": lambda: b"\x80\x02" + b"]" * 4_000_000 + b".",
    "4 million marks": lambda: b"\x80\x02" + b"(" * 4_000_000 + b".",
    "4 million memos": lambda: b"\x80\x04]" + b"\x94" * 4_000_000 + b".",
    "many layers of one list": lambda: layers_of(b"](" + b"]" * 200 + b"eq\0", b"h\0", 100_000),
    "one row of 8192 numbers in 60,000 layers": lambda: layers_of(b"]" + ROW_OF_8192 + b"aq\xfe", b"h\xfe", 60_000),
    "one row of 8192 numbers 60,000 times": lambda: keyed(b"](" + ROW_OF_8192 + b"q\xfe" + b"h\xfe" * 60_000 + b"e"),
    "a billion laughs": lambda: keyed(b"h\x1e", LAUGHS),
    "33 MiB of pickle": lambda: b"\x80\x02B" + struct.pack("<I", 33 * 2**20) + bytes(33 * 2**20) + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_within_limits(case: str, tmp_path: Path, operations: list[str]) -> None:
    error = assert_refused(HOSTILE[case](), tmp_path, operations)
    assert isinstance(error, DamagedError) == (case != "30 MB of astral text"), "a text is merely not a lock"


def test_a_memo_of_giant_indices_costs_nothing(tmp_path: Path) -> None:
    rows = pickle.dumps([entry()], 2)[2:-1]
    data = keyed(rows + b"r\xff\xff\xff\xffp" + b"9" * 4000 + b"\n")
    assert load(data, tmp_path).heads.tolist() == [3]


# ---- Hostile zips ----


def raw_zip(
    payload: bytes, method: int = 0, size: int | None = None, flags: int = 0, names: tuple[str, ...] = ("a/data.pkl",),
    extra: bytes = b"", at: int = 0,
) -> bytes:  # fmt: skip
    """A zip of one payload, which as many directory entries as there are names point at, and lie about."""
    size = len(payload) if size is None else size
    sums = struct.pack("<III", zlib.crc32(payload), len(payload), size)
    first = names[0].encode()
    start = (
        b"PK\x03\x04" + struct.pack("<HHHI", 20, flags, method, 0) + sums + struct.pack("<HH", len(first), 0) + first
    )
    before = b"PK\x01\x02" + struct.pack("<HHHHI", 20, 20, flags, method, 0) + sums
    directory = b"".join(
        before + struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, at) + name.encode() + extra
        for name in names
    )
    end = struct.pack(
        "<HHHHIIH", 0, 0, len(names) & 0xFFFF, len(names) & 0xFFFF, len(directory), len(start + payload), 0
    )
    return start + payload + directory + b"PK\x05\x06" + end


def deflated_zeros(megabytes: int) -> bytes:
    """A raw deflate stream of so many MiB of zeros, made without deflating them all."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + deflate.flush()


ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "1 GiB of zeros": (lambda: raw_zip(deflated_zeros(1024), 8, 2**30), "more than 32 MiB"),
    "1 GiB that claims to be 1 kB": (lambda: raw_zip(deflated_zeros(1024), 8, 1000), "damaged zip"),
    "bzip2": (lambda: raw_zip(bz2.compress(bytes(2**20)), 12, 2**20), "neither stored nor deflated"),
    "lzma": (lambda: raw_zip(bytes(100), 14, 2**30), "neither stored nor deflated"),
    "an unknown method": (lambda: raw_zip(bytes(100), 77), "neither stored nor deflated"),
    "encrypted": (lambda: raw_zip(pickle.dumps(lock_value(), 2), flags=1), "damaged zip.*encrypted"),
    "strongly encrypted": (lambda: raw_zip(pickle.dumps(lock_value(), 2), flags=0x41), "damaged zip"),
    "patched": (lambda: raw_zip(pickle.dumps(lock_value(), 2), flags=0x20), "damaged zip"),
    "two data.pkl": (lambda: raw_zip(b"N.", names=("a/data.pkl", "b/data.pkl")), "2 data.pkl inside"),
    "no data.pkl": (lambda: raw_zip(b"N.", names=("a/other.pkl",)), "0 data.pkl inside"),
    "a data.pkl of another name": (lambda: raw_zip(b"N.", names=("a/xdata.pkl",)), "0 data.pkl inside"),
    "60,000 entries": (lambda: raw_zip(b"N.", names=("d",) * 60_000), "more than 1000 files"),
    "a wrong checksum": (lambda: zipped(b"\x80\x02]N.").replace(b"]N.", b"]]."), "damaged zip"),
    "offset beyond the end": (lambda: raw_zip(b"N.", at=2**32 - 2), "damaged zip"),
    "offset beyond int64": (
        lambda: raw_zip(b"N.", at=2**32 - 1, extra=struct.pack("<HHQ", 1, 8, 2**64 - 1)), "damaged zip"
    ),
    "a broken zip64 extra": (lambda: raw_zip(b"N.", at=2**32 - 1, extra=struct.pack("<HHI", 1, 4, 0)), "damaged zip"),
    "a size of 2**32 - 2": (lambda: raw_zip(deflated_zeros(1), 8, 2**32 - 2), "damaged"),
    "only magic": (lambda: b"PK\x03\x04", "damaged zip"),
    "half": (lambda: zipped(pickle.dumps(lock_value(), 2))[:300], "damaged zip"),
    "a checkpoint": (lambda: zipped(pickle.dumps({"model.layers.0.self_attn.o_proj.weight": 1}, 2)), "not a lock"),
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
def test_a_hostile_zip_is_refused_within_limits(case: str, tmp_path: Path, operations: list[str]) -> None:
    build, message = ZIPS[case]
    error = assert_refused(build(), tmp_path, operations, message)
    assert isinstance(error, DamagedError) == (case != "a checkpoint")


def test_zip_entries_that_overlap_do_no_harm(tmp_path: Path) -> None:
    data = raw_zip(pickle.dumps(lock_value(), 2), names=("a/data.pkl", "a/version", "a/byteorder"))
    try:
        lock = load(data, tmp_path)
    except FastlockError:  # newer Pythons look for it
        return
    assert_is_the_lock(lock)


# ---- Ten thousand mutations ----

LENGTHS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 2, 4, 8, 40, 300)))
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                del out[at:]
            case 3:
                del out[at:end]
            case 4:
                out[at:at] = out[at:end] * rng.choice((1, 2, 100))
            case 5:
                out[at : at + rng.randrange(2)] = b"".join(rng.choices(OPCODES, k=rng.randrange(1, 6)))
            case 6:
                width = rng.choice((1, 2, 4, 8))
                out[at : at + width] = (rng.choice(LENGTHS) & (1 << 8 * width) - 1).to_bytes(width, "little")
            case _:
                source = rng.randrange(len(out) + 1)
                out[at:end] = out[source : source + end - at]
    return bytes(out)


def mutated_inside(data: bytes, rng: random.Random) -> bytes:
    """A zip whose pickle, or a safetensors file whose header, is mutated while the container stays sound."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            pickled = archive.read(name)
        return zipped(mutated(pickled, rng), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    size = int.from_bytes(data[:8], "little")
    header = mutated(data[8 : 8 + size].rstrip(), rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def seeds(kind: str, tmp_path: Path) -> list[bytes]:
    value = lock_value()
    if kind == "zip":
        return [zipped(pickle.dumps(value, 2)), zipped(pickle.dumps(value, 4), zipfile.ZIP_DEFLATED)]
    if kind == "pickle":
        legacy = io.BytesIO()
        torch.save(value, legacy, _use_new_zipfile_serialization=False)
        return [
            *(respelled(pickle.dumps(value, protocol), "numpy.core") for protocol in (2, 3, 4, 5)),
            legacy.getvalue(),
        ]
    if kind == "released":
        return [LLAMA_8B.read_bytes()]
    load(pickle.dumps(value, 2), tmp_path).save(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    return [whole, whole.replace(b'"lock_digest"', b'"lost_digest"')]


@pytest.mark.parametrize(
    ("kind", "count"),
    [("zip", 3000), ("pickle", 3000), ("safetensors", 3000), pytest.param("released", 1000, marks=needs_released)],
)
def test_a_mutated_file_loads_or_is_refused(kind: str, count: int, tmp_path: Path, operations: list[str]) -> None:
    rng = random.Random(20240607)
    originals = seeds(kind, tmp_path)
    outcomes = {"loaded": 0, "refused": 0}
    tracemalloc.start()
    try:
        for number in range(count):
            data = rng.choice(originals)
            mutate = mutated if kind == "pickle" or rng.random() < 0.4 else mutated_inside
            data = mutate(data, rng)
            message = ""
            operations.clear()
            tracemalloc.reset_peak()
            try:
                load(data, tmp_path)
            except FastlockError as error:
                message = str(error)
            except BaseException:
                (tmp_path / "fails").write_bytes(data)
                print(f"mutation {number} of {kind}, kept as {tmp_path / 'fails'}")
                raise
            outcomes["refused" if message else "loaded"] += 1
            assert len(message) < 1000
            assert len(operations) <= safelock.MAX_OPCODES + 1
            assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > count / 100, outcomes


def test_looks_like() -> None:
    assert safelock.looks_like(zipped(b""))
    assert safelock.looks_like(pickle.dumps(lock_value(), 2))
    assert not safelock.looks_like(b"")
    assert not safelock.looks_like(struct.pack("<Q", 0x80) + b'{"a":1}')
    assert not safelock.looks_like(struct.pack("<Q", 0x04034B50) + b"{}")
