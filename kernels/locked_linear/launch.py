"""The projection with a lock per row, y = (x + s d[lock]) Wᵀ + c: the ways to compute it, and the choice among them.

Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from fastlock.errors import FastlockError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
# Rows are counted in powers of two between these: each such number has its own choice.
FEWEST_ROWS, MOST_ROWS = 16, 8192
DECODE_ROWS = 64
# What tl.dot takes at least along the columns of x.
LEAST_BLOCK_K = 16
MOST_REGISTERS = 255
VECTOR_BYTES = 16
# Shared memory that a program needs besides its tiles of x and W.
OTHER_SHARED_BYTES = 1024


@dataclass(frozen=True)
class Tile:
    """How Triton's projection is cut up.

    Attributes:
        rows, hidden, width: of x, of W and of both, in one program and step (powers of two).
        num_warps: of one program, 32 threads each.
        num_stages: how many steps' tiles are in flight.
    """

    rows: int
    hidden: int
    width: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Such as 128x256x64-8-4."""
        return f"{self.rows}x{self.hidden}x{self.width}-{self.num_warps}-{self.num_stages}"

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """The most shared memory that one program may need."""
        return (self.rows + self.hidden) * self.width * dtype.itemsize * self.num_stages + OTHER_SHARED_BYTES

    def options(self) -> dict[str, Any]:
        """Triton's compile options. Fusion is set because its default is not the same in every Triton.

        Without a limit of its own, ptxas spills a few registers to come to a number that lets more programs in.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": MOST_REGISTERS,
            "enable_fp_fusion": True,
        }


Tiles: TypeAlias = tuple[Tile, ...]

# Few rows: the time is that of reading W, so that the programs are as many as the processors of the GPU (132 on an
# H100, hidden 4096 and up), and each keeps tens of kilobytes of W in flight.
ONE_ROW_TILES: Tiles = (
    Tile(16, 32, 128, 4, 5),
    Tile(16, 16, 256, 4, 4),
    Tile(16, 32, 256, 4, 4),
    Tile(16, 64, 128, 4, 4),
)
FEW_ROWS_TILES: Tiles = (
    Tile(32, 32, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 64, 64, 4, 4),
)
MORE_ROWS_TILES: Tiles = (Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4))
MANY_ROWS_TILES: Tiles = (Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3))
# Where the tensor cores take their sums or operands from elsewhere than registers (sm_90, sm_100).
LARGE_TILES: Tiles = (Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 3))
LARGE_MAJORS = (9, 10)
# float32 is computed as float32, without tensor cores: small tiles, whose operands fit into the registers.
FLOAT32_FEW_TILES: Tiles = (Tile(16, 32, 32, 4, 4),)
FLOAT32_MANY_TILES: Tiles = (Tile(64, 64, 16, 8, 3),)


@dataclass(frozen=True)
class Way:
    """One way to compute it.

    Attributes:
        kind: "shift": Triton's projection, d added to x as it is read; "gather": Triton's projection, the fold added
            to its sums; "add": torch's projection (cuBLAS), the fold added to y; "around": torch's projection, d added
            to the locked columns of x before it and these put back after it; "torch": by torch alone.
        tile: of Triton's projection; None for the others.
    """

    kind: str
    tile: Tile | None = None

    @property
    def name(self) -> str:
        """Such as gather-128x256x64-8-4."""
        return self.kind if self.tile is None else f"{self.kind}-{self.tile.name}"


BY_TORCH = Way("torch")


def layout_of(weight: torch.Tensor) -> str:
    """What of W lies next to one another in memory: its "rows"' numbers, its "columns"' (GPT-2's Conv1D), or "none"."""
    return "rows" if weight.stride(1) == 1 else "columns" if weight.stride(0) == 1 else "none"


@dataclass(frozen=True, eq=False)
class Inputs:
    """What it is computed from; all on one device.

    Attributes:
        x: [rows, width], of one dtype with weight and bias.
        weight: W, [hidden, width]; its rows or its columns lie next to one another.
        bias: c, [hidden], or None.
        heads: the column of `slots` for each head, -1 where no lock shifts it; [num_heads] int32, width = num_heads *
            head_dim.
        slots: the row of `values` for each lock and column, -1 where the lock does not shift that head; [num_locks,
            columns] int32.
        values: displacements at strength 1, [n, head_dim] float32.
        folds: W d of each lock at strength 1, [num_locks, hidden] float32.
        lock_of_row: the lock of each entry, -1 for none; [entries] int32. Each entry serves rows / entries rows.
        strength_of_row: the strength of each entry, [entries] float32.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    heads: torch.Tensor
    slots: torch.Tensor
    values: torch.Tensor
    folds: torch.Tensor
    lock_of_row: torch.Tensor
    strength_of_row: torch.Tensor

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def rows_per_entry(self) -> int:
        return self.rows // self.lock_of_row.shape[0]

    @property
    def head_dim(self) -> int:
        return self.values.shape[1]

    @property
    def transposed(self) -> bool:
        """Whether a column of W lies in one piece in memory, not a row."""
        return layout_of(self.weight) == "columns"

    def shape(self) -> tuple[object, ...]:
        """Inputs for which this is the same are computed in the same way."""
        x, weight = self.x, self.weight
        return x.device, x.dtype, *weight.shape, layout_of(weight), self.head_dim, bucket(self.rows)


def locked_linear(inputs: Inputs) -> torch.Tensor:
    """Compute it on a CUDA device by the way that was fastest there when it was first called for such a shape.

    What is chosen changes the result by no more than rounding. While a CUDA graph is captured nothing can be timed, or
    loaded on the device: for a shape that was not computed before, torch alone does it, this once.

    Returns:
        y, [rows, hidden] of x's dtype.
    """
    shape = inputs.shape()
    way = _chosen.get(shape)
    if way is None:
        with torch.cuda.device(inputs.x.device):
            # Times of no rows would decide for those that come later.
            if torch.cuda.is_current_stream_capturing() or 0 in (inputs.rows, *inputs.weight.shape):
                return run(BY_TORCH, inputs)
            candidates = ways_for(inputs)
            many = cold(inputs) if len(candidates) > 1 else []
            way = _chosen[shape] = fastest(candidates, partial(seconds, many=many))
    return run(way, inputs)


_chosen: dict[tuple[object, ...], Way] = {}


def chosen(inputs: Inputs) -> Way | None:
    """The way that was chosen for such inputs; None before they were first computed."""
    return _chosen.get(inputs.shape())


def forget() -> None:
    """Choose anew, as after another program used the GPU while the ways were timed."""
    _chosen.clear()


def fastest(candidates: Iterable[Way], time: Callable[[Way], float]) -> Way:
    """The candidate that takes the least time, the first of them if there are several; alone, it is not timed.

    Where none of them runs, the last one.
    """
    ways = list(candidates)
    if len(ways) == 1:
        return ways[0]
    times = {way: time(way) for way in ways}
    return min(ways, key=times.__getitem__) if min(times.values()) < math.inf else ways[-1]


def bucket(rows: int) -> int:
    """The number of rows, rounded up to a power of two, between FEWEST_ROWS and MOST_ROWS."""
    return int(min(max(1 << (rows - 1).bit_length(), FEWEST_ROWS), MOST_ROWS))


def ways_for(inputs: Inputs) -> list[Way]:
    """The ways that these inputs can be computed in on their device."""
    in_one_piece = layout_of(inputs.weight) != "none"
    if inputs.x.dtype not in DTYPES or not in_one_piece or inputs.head_dim > MAX_HEAD_DIM or not _has_triton():
        return [BY_TORCH]
    device: Any = torch.cuda.get_device_properties(inputs.x.device)
    return ways(inputs.x.dtype, inputs.rows, inputs.head_dim, device.major, device.shared_memory_per_block_optin)


def ways(dtype: torch.dtype, rows: int, head_dim: int, major: int, shared_bytes: int) -> list[Way]:
    """The ways for a shape on a device; of equally fast ones the first is taken.

    Args:
        major: of the device's compute capability.
        shared_bytes: shared memory that one program may have there.
    """
    found = tiles(dtype, rows, major, shared_bytes)
    by_triton = [Way("gather", tile) for tile in found]
    by_triton += [Way("shift", tile) for tile in shift_tiles(found, head_dim, dtype)]
    by_cublas = [Way("around"), Way("add")]
    # A launch of its own costs some microseconds, of which a projection of few rows takes not many more.
    return [*(by_triton + by_cublas if bucket(rows) <= DECODE_ROWS else by_cublas + by_triton), BY_TORCH]


def tiles(dtype: torch.dtype, rows: int, major: int, shared_bytes: int) -> list[Tile]:
    """The tiles to try for so many rows on a device."""
    count, large = bucket(rows), major in LARGE_MAJORS
    wanted: Tiles
    if dtype == torch.float32:
        wanted = FLOAT32_FEW_TILES if count <= FEWEST_ROWS else FLOAT32_MANY_TILES
    elif count <= FEWEST_ROWS:
        wanted = ONE_ROW_TILES
    elif count <= DECODE_ROWS:
        wanted = tuple(tile for tile in FEW_ROWS_TILES if tile.rows <= count)
    elif count <= 512:
        wanted = MORE_ROWS_TILES
    else:
        wanted = LARGE_TILES + MANY_ROWS_TILES if large else MANY_ROWS_TILES
    return [tile for tile in wanted if tile.shared_bytes(dtype) <= shared_bytes]


def shift_tiles(found: Iterable[Tile], head_dim: int, dtype: torch.dtype) -> list[Tile]:
    """The same tiles, no wider than what divides head_dim, so that each step is inside one head.

    Without those that are then too small for each thread to read a whole vector of x and of W.
    """
    widest = head_dim & -head_dim
    narrowed = dict.fromkeys(replace(tile, width=min(tile.width, widest)) for tile in found)
    vector = VECTOR_BYTES // dtype.itemsize
    return [
        tile
        for tile in narrowed
        if tile.width >= LEAST_BLOCK_K and min(tile.rows, tile.hidden) * tile.width >= 32 * tile.num_warps * vector
    ]


def run(way: Way, inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute it in one way on the current stream. Does not wait for it.

    Args:
        out: where Triton's projection is to put y, contiguous [rows, hidden]; None for new memory of x's dtype.

    Returns:
        y, [rows, hidden].

    Raises:
        FastlockError: Triton can't be imported.
    """
    x = inputs.x
    if out is None and way.tile is not None:
        out = x.new_empty(inputs.rows, inputs.weight.shape[0])
    if inputs.rows == 0 or inputs.weight.shape[0] == 0:
        return x.new_empty(inputs.rows, inputs.weight.shape[0]) if out is None else out
    if way == BY_TORCH:
        return by_torch(inputs)
    jit = _jit()
    if out is not None and way.tile is not None:
        jit.gemm(inputs if x.stride(1) == 1 else replace(inputs, x=x.contiguous()), way, out)
        return out
    if way.kind == "add":
        y = functional.linear(x, inputs.weight, inputs.bias)
        jit.add(inputs, y)
        return y
    return _around(inputs, jit)


def by_torch(inputs: Inputs) -> torch.Tensor:
    """y by torch alone, on any device and of any dtype: the projection, then the folds added to the locked rows.

    Sums of 16-bit results are made in float32, and rounded once more. Rows without a lock are the plain projection's.
    A lock that there is not gives NaN, and so does a negative strength.
    """
    y = functional.linear(inputs.x, inputs.weight, inputs.bias)
    lock = inputs.lock_of_row
    if not inputs.rows:
        return y
    there = (lock >= 0) & (lock < inputs.folds.shape[0]) & (inputs.strength_of_row >= 0)
    strength = torch.where(there, inputs.strength_of_row, float("nan"))
    fold = strength[:, None] * inputs.folds[torch.where(there, lock, 0)]  # [entries, hidden] float32
    each = y.view(lock.shape[0], -1, y.shape[1])
    shifted = (each + fold[:, None]).to(y.dtype)  # with the float32 folds, 16-bit results become float32
    return torch.where((lock != -1)[:, None, None], shifted, each).view(y.shape)


def _around(inputs: Inputs, jit: Any) -> torch.Tensor:
    """torch's projection of x while d is in its locked columns; afterwards they hold again what they held, to the bit.

    That is a small part of x, where y would be read and written as a whole. Nothing else may read x on another stream
    meanwhile.
    """
    x = inputs.x
    own = x.stride(1) != 1 or x.stride(0) < x.shape[1]  # rows that overlap, as after expand, can't be written to
    if own:
        inputs = replace(inputs, x=x.contiguous())
    held = x.new_empty(inputs.rows, inputs.slots.shape[1], inputs.head_dim)
    jit.shift(inputs, held)
    try:
        return functional.linear(inputs.x, inputs.weight, inputs.bias)
    finally:  # the caller may go on with x where memory ran out
        if not own:
            jit.put_back(inputs, held)


def cold(inputs: Inputs, runs: int = 10) -> list[Inputs]:
    """The inputs with an x of their own; each with another copy of W, together twice as large as the L2 cache.

    A model reads each W once in a forward pass, which has left the cache until the next one; and what fails while it
    is timed must not have written to a user's x.
    """
    weight, x = inputs.weight, inputs.x.clone()
    cache: int = torch.cuda.get_device_properties(inputs.x.device).L2_cache_size
    count = min(runs, -(-2 * cache // (weight.numel() * weight.itemsize)))
    copies = [weight]
    with contextlib.suppress(torch.OutOfMemoryError):  # then as many as there is room for
        while len(copies) < count:
            copy = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
            copies.append(copy.copy_(weight))
    return [replace(inputs, x=x, weight=copies[i % len(copies)]) for i in range(runs)]


def seconds(way: Way, many: Sequence[Inputs], repeats: int = 3) -> float:
    """How long one way takes on the device, one of the inputs after the other; infinite where it does not run there.

    That is said in a warning, unless the device only has too little shared memory for it.
    """
    try:
        run(way, many[0])  # compiled here
    except Exception as error:  # no compiler, an assembler that is too old: another way will do
        if type(error).__name__ != "OutOfResources":
            warnings.warn(f"fastlock goes without {way.name} on this device: {error}", RuntimeWarning, stacklevel=2)
        return math.inf
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The device waits while the host queues all runs, so that the host's pace is not in the time.
        torch.cuda._sleep(HOLD_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        for inputs in many:
            run(way, inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(many))
    return statistics.median(times)


# Some milliseconds, in which the host queues ten runs.
HOLD_CYCLES = 8_000_000


@cache
def _has_triton() -> bool:
    try:
        _jit()
    except FastlockError:
        return False
    return True


def _jit() -> Any:
    try:
        from fastlock.kernels.locked_linear import triton_kernels as locked_linear_jit
    except ImportError as error:
        raise FastlockError(f"Triton, which compiles this kernel, can't be imported ({error}). Install it.") from None
    return locked_linear_jit
