"""Reading the released `.safelock` files: pickles, read as data and never executed.

A `.safelock` is what `torch.save` writes for `{"model.layers.N.self_attn.head_out": [(head, direction, sigma), ...]}`
with NumPy scalars and arrays (github.com/zhu-minjun/SafetyLock). Python's own unpickler would call what the file
names. The reader here is a stack machine over `pickletools.genops` that knows the opcodes and the few globals such
files use. It *describes* their results instead of calling anything: no NumPy or pickle machinery ever runs on the file.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fastlock.errors import DamagedError, FastlockError

# Every head of a 70B base (80 layers of 64) fits, of 256 numbers each, and a hostile file is refused within a second.
MAX_PICKLE_BYTES = 32 * 1024 * 1024
MAX_OPCODES = 400_000
MAX_ROWS = 8_192
MAX_ARRAY_NUMBERS = 8_192
MAX_DIRECTION_NUMBERS = 2 * 1024 * 1024
MAX_ZIP_ENTRIES = 1_000

_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_DIRECTORY_MAGIC = b"PK\x01\x02"
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OSError, EOFError, ValueError, OverflowError)
_PICKLE_MAGIC = b"\x80"
_TORCH_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before it wrote zips
_LAYER_KEY = re.compile(r"model\.layers\.([0-9]{1,6})\.self_attn\.head_out")
_NUMBER_TYPES = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
_GLOBALS = {
    "numpy dtype": "dtype",
    "numpy ndarray": "ndarray",
    "_codecs encode": "encode",
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.multiarray scalar": "scalar",
    "numpy._core.multiarray scalar": "scalar",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
}


def looks_like(data: bytes) -> bool:
    """Whether the bytes are a zip or a pickle, as `.safelock` files are, rather than safetensors.

    A safetensors file starts with its header's length, which would have to be absurd to begin like a zip, and is
    followed by a brace.
    """
    if data[8:9] == b"{":
        return False
    return data.startswith((_ZIP_MAGIC, _PICKLE_MAGIC))


def read(data: bytes, where: str) -> dict[str, Any]:
    """The rows of a `.safelock` file.

    Args:
        data: the file's bytes.
        where: the file's name, for messages.

    Returns:
        `layers`, `heads` (int64 [K]), `directions` (float32 [K, head_dim]) and `scales` (float32 [K]).

    Raises:
        DamagedError: the file is damaged, names a global that no lock uses, declares a huge array, or holds far more
            than a lock does. Nothing in the file is executed.
        FastlockError: it is not a lock.
    """
    reader = _Reader(where)
    stream = io.BytesIO(_pickle_of(data, where))
    try:
        value = reader.load(stream)
        if value == _TORCH_LEGACY_MAGIC:
            for _protocol_then_system_then_object in range(3):
                value = reader.load(stream)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, EOFError) as error:
        raise DamagedError(f"{where}: damaged pickle ({str(error)[:200]}). Download it again.") from None
    return _rows(value, where)


def _pickle_of(data: bytes, where: str) -> bytes:
    """The pickle itself: the one `data.pkl` of the zip, or the whole file."""
    if not data.startswith(_ZIP_MAGIC):
        pickle = data
    elif data.count(_ZIP_DIRECTORY_MAGIC) > MAX_ZIP_ENTRIES:
        raise DamagedError(
            f"{where}: a zip of more than {MAX_ZIP_ENTRIES} files; a .safelock has a handful. Give the lock file."
        )
    else:
        pickle = _unzipped(data, where)
    if len(pickle) > MAX_PICKLE_BYTES:
        raise DamagedError(
            f"{where}: holds more than {MAX_PICKLE_BYTES // 2**20} MiB; no lock is that large. Give the lock file."
        )
    return pickle


def _unzipped(data: bytes, where: str) -> bytes:
    """The bytes of `data.pkl`, cut off one byte past the limit."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
            if len(entries) != 1:
                raise DamagedError(
                    f"{where}: a zip with {len(entries)} data.pkl inside; a .safelock has one. Give the lock file."
                )
            if entries[0].compress_type not in _ZIP_METHODS:  # zipfile inflates the other methods without a limit
                raise DamagedError(
                    f"{where}: its data.pkl is neither stored nor deflated, as a .safelock's is. Download it again."
                )
            with archive.open(entries[0]) as file:
                return file.read(MAX_PICKLE_BYTES + 1)
    except _ZIP_ERRORS as error:
        raise DamagedError(f"{where}: damaged zip ({str(error)[:200]}). Download it again.") from None


@dataclass
class _Global:
    name: str


@dataclass
class _Dtype:
    """`numpy.dtype(code)`; its byte order comes with BUILD."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    """An array or scalar as the file describes it; we decode the `raw` bytes at the end."""

    dtype: _Dtype
    shape: tuple[int, ...]
    raw: bytes


class _Mark:
    pass


_MARK = _Mark()


class _Reader:
    def __init__(self, where: str) -> None:
        self.where = where
        self.encoded_bytes = 0

    def load(self, stream: io.BytesIO) -> Any:
        """The value of the next pickle in the stream."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                self.refuse(f"more than {MAX_OPCODES} operations")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise EOFError("it ends early")

    def refuse(self, what: str) -> NoReturn:
        raise DamagedError(
            f"{self.where}: {what}. No lock needs this: the file is damaged or made to do harm. "
            "It was not executed; download the lock from its authors."
        )

    def step(self, name: str, argument: Any) -> None:
        """Run one operation: here those that push a value or use the memo."""
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name == "BYTEARRAY8":
            self.stack.append(bytes(argument))
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            self.stack.append([])
        elif name == "EMPTY_DICT":
            self.stack.append({})
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        else:
            self.combine(name, argument)

    def combine(self, name: str, argument: Any) -> None:
        """Run one operation: here those that take values off the stack, and those that name a global."""
        stack = self.stack
        if name in _TUPLE_SIZES:
            items = [stack.pop() for _ in range(_TUPLE_SIZES[name])]
            stack.append(items[::-1])
        elif name in ("TUPLE", "LIST"):
            stack.append(self.pop_to_mark())
        elif name == "APPEND":
            self.append([stack.pop()])
        elif name == "APPENDS":
            self.append(self.pop_to_mark())
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.pop_to_mark())
        elif name == "GLOBAL":
            stack.append(self.known_global(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self.known_global(f"{module} {attribute}" if _are(str, module, attribute) else "?"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.described(function, arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            self.build(target, state)
        else:
            self.refuse(f"the pickle operation {name}")

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            self.refuse("an end without a beginning")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            self.refuse("an append to something that is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2 or not _are(str, *items[::2]):
            self.refuse("a dictionary whose keys are not strings")
        target.update(zip(items[::2], items[1::2], strict=True))

    def known_global(self, name: str) -> _Global:
        if name not in _GLOBALS:
            self.refuse(f"it names the global {name[:80]!r}, which is code to run")
        return _Global(_GLOBALS[name])

    def described(self, function: Any, arguments: Any) -> Any:
        """What calling `function` would give, for the functions that locks use. Tuples are lists here."""
        name = function.name if isinstance(function, _Global) else None
        match name, arguments:
            case "dtype", [str(code), *_] if code in _NUMBER_TYPES:
                return _Dtype(code)
            case "encode", [str(text), "latin1" | "latin-1"]:
                return self.encoded(text)
            case "reconstruct", [_Global("ndarray"), [0], _]:
                return _Array(_Dtype("u1"), (0,), b"")
            case "scalar", [_Dtype() as dtype, bytes(raw)]:
                return self.array(dtype, (), raw)
            case "frombuffer", [bytes(raw), _Dtype() as dtype, [*shape], *_] if _are(int, *shape):
                return self.array(dtype, tuple(shape), raw)
        return self.refuse(f"a call of {name or 'something'} with arguments that no array has")

    def encoded(self, text: str) -> bytes:
        """The text's bytes, counted: a string that the file holds once can be encoded again and again."""
        self.encoded_bytes += len(text)
        if self.encoded_bytes > MAX_PICKLE_BYTES:
            self.refuse(f"arrays of more than {MAX_PICKLE_BYTES // 2**20} MiB")
        return text.encode("latin-1")

    def build(self, target: Any, state: Any) -> None:
        match target, state:
            case _Dtype(), [int(), "<" | ">" | "|" | "=" as order, *_]:
                target.order = "<" if order in "|=" else order
            case _Array(), [int(), [*shape], _Dtype() as dtype, bool(), bytes(raw)] if _are(int, *shape):
                built = self.array(dtype, tuple(shape), raw)
                target.dtype, target.shape, target.raw = built.dtype, built.shape, built.raw
            case _:
                self.refuse("an object state that no array has")

    def array(self, dtype: _Dtype, shape: tuple[int, ...], raw: bytes) -> _Array:
        numbers = math.prod(shape) if len(shape) <= 4 and all(0 < n <= MAX_ARRAY_NUMBERS for n in shape) else 0
        if not 0 < numbers <= MAX_ARRAY_NUMBERS:
            self.refuse(f"an array that is empty or of more than {MAX_ARRAY_NUMBERS} numbers")
        if len(raw) != numbers * int(dtype.code[1:]):
            self.refuse(f"an array of {numbers} {dtype.code} numbers in {len(raw)} bytes")
        return _Array(dtype, shape, raw)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_AGAIN = "The file is damaged: download it again."


def _are(exact: type, *values: Any) -> bool:
    return all(type(value) is exact for value in values)


def _rows(value: Any, where: str) -> dict[str, Any]:
    """Layers, heads, directions and scales out of `{"model.layers.N.self_attn.head_out": [(head, u, sigma), ...]}`."""
    layers: list[int] = []
    heads: list[int] = []
    directions: list[np.ndarray[Any, Any]] = []
    scales: list[float] = []
    for layer, entry in _entries(value, where):
        here = f"{where}: row {len(layers)} (layer {layer})"
        if type(entry) is not list or len(entry) != 3:
            raise DamagedError(f"{here} is not (head, direction, sigma). {_AGAIN}")
        layers.append(layer)
        heads.append(_index(entry[0], here))
        directions.append(_direction(entry[1], here))
        scales.append(_scale(entry[2], here))
        if directions[-1].shape != directions[0].shape:
            raise DamagedError(
                f"{where}: row {len(layers) - 1} (layer {layer}, head {heads[-1]}) has a direction of "
                f"{directions[-1].size} numbers, row 0 one of {directions[0].size}. All heads of a model have one "
                f"head_dim. {_AGAIN}"
            )
        if len(directions) * directions[0].size > MAX_DIRECTION_NUMBERS:  # one array can stand in many rows
            raise DamagedError(f"{where}: more than {MAX_DIRECTION_NUMBERS} numbers; no lock is that large. {_AGAIN}")
    if not layers:
        raise DamagedError(f"{where}: holds no locked head. The file is empty or damaged: download it again.")
    return {
        "layers": np.array(layers, dtype=np.int64),
        "heads": np.array(heads, dtype=np.int64),
        "directions": np.stack(directions),
        "scales": _float32(np.array(scales)),
    }


def _entries(value: Any, where: str) -> Iterator[tuple[int, Any]]:
    """The layer and the content of every row, in the order of the file."""
    if type(value) is not dict:
        raise FastlockError(f"{where}: not a lock: it holds no dictionary of layers. Give the lock file.")
    count = 0
    for key, entries in value.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None:
            raise FastlockError(
                f"{where}: not a lock: found {key[:80]!r} where 'model.layers.N.self_attn.head_out' should be. Give "
                "the lock file."
            )
        if type(entries) is not list:
            raise DamagedError(f"{where}: {key!r} is not a list of heads. {_AGAIN}")
        count += len(entries)
        if count > MAX_ROWS:
            raise DamagedError(f"{where}: more than {MAX_ROWS} heads; no lock is that large. {_AGAIN}")
        for entry in entries:
            yield int(match[1]), entry


def _decoded(value: _Array) -> np.ndarray[Any, Any]:
    return np.frombuffer(value.raw, dtype=value.dtype.order + value.dtype.code)


def _float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As float32: what does not fit becomes infinite or NaN, which the lock's own checks refuse with its row."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


def _index(value: Any, here: str) -> int:
    index = -1
    if type(value) is int:
        index = value
    elif isinstance(value, _Array) and value.shape in ((), (1,)) and value.dtype.code[0] in "iu":
        index = int(_decoded(value)[0])
    if not 0 <= index < 2**31:
        raise DamagedError(f"{here} has a head that is not an index. {_AGAIN}")
    return index


def _scale(value: Any, here: str) -> float:
    if isinstance(value, _Array) and value.shape in ((), (1,)):
        return float(_decoded(value)[0])
    if type(value) is float or (type(value) is int and abs(value) < 2**63):
        return float(value)
    raise DamagedError(f"{here} has a scale that is not a number. {_AGAIN}")


def _direction(value: Any, here: str) -> np.ndarray[Any, Any]:
    if isinstance(value, _Array) and len(value.shape) == 1 and value.dtype.code[0] == "f":
        return _float32(_decoded(value))
    raise DamagedError(f"{here} has a direction that is not a vector of floats. {_AGAIN}")
