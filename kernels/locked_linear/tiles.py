"""The ways to compute the projection with a lock per row, as plain data: tiles, and which to try for a shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_HEAD_DIM = 512

# Rows are rounded up to powers of two between these, each of which has its own choice.
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
    """How Triton's projection is cut into programs and steps.

    Attributes:
        rows, hidden, width: of x, of W, and of both: of one program and step (powers of two).
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

# Up to DECODE_ROWS the time is that of reading W: many bytes of it must be on their way to each multiprocessor, but a
# row of x is read again by every program. The model below picks among these; of equals, the first. The last ones are
# for GPUs on which the others do not fit.
ONE_ROW_TILES: Tiles = (
    Tile(16, 32, 128, 4, 8),
    Tile(16, 32, 256, 4, 6),
    Tile(16, 64, 128, 4, 8),
    Tile(16, 16, 256, 4, 6),
    Tile(16, 32, 256, 4, 4),
    Tile(16, 64, 128, 4, 4),
)

FEW_ROWS_TILES: Tiles = (
    Tile(32, 64, 128, 4, 7),
    Tile(32, 128, 64, 4, 7),
    Tile(32, 32, 128, 4, 7),
    Tile(32, 64, 128, 4, 4),
    Tile(32, 32, 128, 4, 4),
)

DECODE_ROWS_TILES: Tiles = (
    Tile(64, 64, 128, 4, 6),
    Tile(64, 128, 64, 4, 7),
    Tile(64, 64, 64, 4, 8),
    Tile(64, 32, 128, 4, 7),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 64, 64, 4, 4),
)

MORE_ROWS_TILES: Tiles = (Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4))

MANY_ROWS_TILES: Tiles = (Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3))

# Where the tensor cores take their sums or operands from elsewhere than registers (sm_90, sm_100).
LARGE_TILES: Tiles = (Tile(128, 256, 64, 8, 4),)

LARGE_MAJORS = (9, 10)

# float32 is computed as float32, without tensor cores: small tiles, whose operands fit into the registers.
FLOAT32_FEW_TILES: Tiles = (Tile(16, 32, 32, 4, 4),)

FLOAT32_MANY_TILES: Tiles = (Tile(64, 64, 16, 8, 3),)


@dataclass(frozen=True)
class Sizes:
    """What the projection is of.

    Attributes:
        dtype: of x and W.
        rows: of x.
        hidden, width: of W.
        head_dim: columns of one head.
    """

    dtype: torch.dtype
    rows: int
    hidden: int
    width: int
    head_dim: int


@dataclass(frozen=True)
class Multiprocessors:
    """Those of a device.

    Attributes:
        major: of its compute capability.
        count: how many there are.
        shared_bytes: shared memory that one program may have.
    """

    major: int
    count: int
    shared_bytes: int


# The model of few rows, for each multiprocessor: as an H200 is expected to be, with 132 of them. Bytes a second from
# memory (4.3e12 in all) and from the L2 cache (5.7e12); and seconds that a read takes while many are on their way,
# twice those of a lone one. Not measured: they decide only what is not compiled at all.
MEMORY_RATE, CACHE_RATE, LATENCY = 33e9, 43e9, 1.4e-6
# What the model says is this much slower than the best cannot win; and of the rest, so many are compiled.
HOPELESS = 1.5
MOST_GATHER, MOST_SHIFT = 3, 2


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


def bucket(rows: int) -> int:
    """The number of rows, rounded up to a power of two, between FEWEST_ROWS and MOST_ROWS."""
    return int(min(max(1 << (rows - 1).bit_length(), FEWEST_ROWS), MOST_ROWS))


def ways(sizes: Sizes, on: Multiprocessors) -> list[Way]:
    """The ways that are worth trying on a device: each of Triton's has to be compiled first."""
    possible = triton_ways(sizes.dtype, sizes.rows, sizes.head_dim, on)
    by_triton = likeliest([way for way in possible if way.kind == "gather"], sizes, on, MOST_GATHER)
    by_triton += likeliest([way for way in possible if way.kind == "shift"], sizes, on, MOST_SHIFT)
    by_cublas = [Way("around"), Way("add")]
    # Another launch costs some microseconds, and a projection of few rows does not take many more.
    return [*(by_triton + by_cublas if bucket(sizes.rows) <= DECODE_ROWS else by_cublas + by_triton), BY_TORCH]


def triton_ways(dtype: torch.dtype, rows: int, head_dim: int, on: Multiprocessors) -> list[Way]:
    """Every projection of Triton's for so many rows that fits a device."""
    fitting = tiles(dtype, rows, on.major, on.shared_bytes)
    found = [Way("gather", tile) for tile in fitting]
    # Tensor cores that read x from shared memory wait where d is added to it in registers, at every step, while the
    # gather of a tile adds one row of folds to all sums of it: there the shift cannot win.
    if bucket(rows) <= DECODE_ROWS or dtype == torch.float32 or on.major not in LARGE_MAJORS:
        found += [Way("shift", tile) for tile in shift_tiles(fitting, head_dim, dtype)]
    return found


def likeliest(candidates: Sequence[Way], sizes: Sizes, on: Multiprocessors, most: int) -> list[Way]:
    """Of Triton's ways for few rows, the `most` that the model says are the fastest; all of them for more rows.

    As many rows are reckoned with as the choice may be kept for; and of tiles that differ in their stages alone, one is
    enough.
    """
    rows = bucket(sizes.rows)
    if rows > DECODE_ROWS or not candidates:
        return list(candidates)
    times = {way: modelled_seconds(way.tile, replace(sizes, rows=rows), on) for way in candidates if way.tile}
    hopeless = HOPELESS * min(times.values())
    found: dict[object, Way] = {}
    for way in sorted(times, key=times.__getitem__):
        if way.tile and times[way] <= hopeless:
            found.setdefault(replace(way.tile, num_stages=0), way)
    return list(found.values())[:most]


def modelled_seconds(tile: Tile, sizes: Sizes, on: Multiprocessors) -> float:
    """Seconds to bring W and x to the multiprocessors, for few rows: W from memory, all from the L2 cache."""
    of_weight = sizes.hidden * sizes.width * sizes.dtype.itemsize
    of_x = programs(tile, sizes) * min(sizes.rows, tile.rows) * sizes.width * sizes.dtype.itemsize
    rate = min(MEMORY_RATE, weight_in_flight(tile, sizes, on) / LATENCY)
    return max(of_weight / rate, (of_weight + of_x) / CACHE_RATE) / on.count


def weight_in_flight(tile: Tile, sizes: Sizes, on: Multiprocessors) -> float:
    """Bytes of W that are on their way to a multiprocessor, on average over all of them."""
    running = min(programs(tile, sizes), on.count * at_once(tile, sizes.dtype, on.shared_bytes))
    return running * (tile.num_stages - 1) * tile.hidden * tile.width * sizes.dtype.itemsize / on.count


def programs(tile: Tile, sizes: Sizes) -> int:
    """How many programs share out W."""
    return -(-sizes.hidden // tile.hidden)


def at_once(tile: Tile, dtype: torch.dtype, shared_bytes: int) -> int:
    """How many programs one multiprocessor runs, by shared memory: it has 1 KiB more than one program may have."""
    return max(1, (shared_bytes + OTHER_SHARED_BYTES) // tile.shared_bytes(dtype))


def tiles(dtype: torch.dtype, rows: int, major: int, shared_bytes: int) -> list[Tile]:
    """The tiles for so many rows that fit a device."""
    count, large = bucket(rows), major in LARGE_MAJORS
    wanted: Tiles
    if dtype == torch.float32:
        wanted = FLOAT32_FEW_TILES if count <= FEWEST_ROWS else FLOAT32_MANY_TILES
    elif count <= FEWEST_ROWS:
        wanted = ONE_ROW_TILES
    elif count <= DECODE_ROWS:
        wanted = FEW_ROWS_TILES if count < DECODE_ROWS else DECODE_ROWS_TILES
    elif count <= 512:
        wanted = MORE_ROWS_TILES
    else:
        wanted = LARGE_TILES + MANY_ROWS_TILES if large else MANY_ROWS_TILES
    return [tile for tile in wanted if tile.shared_bytes(dtype) <= shared_bytes]


def shift_tiles(wide: Iterable[Tile], head_dim: int, dtype: torch.dtype) -> list[Tile]:
    """The same tiles, no wider than what divides head_dim: each step is then inside one head.

    Those that become too small for each thread to read a whole vector of x and of W are left out.
    """
    widest = head_dim & -head_dim
    narrowed = dict.fromkeys(replace(tile, width=min(tile.width, widest)) for tile in wide)
    vector = VECTOR_BYTES // dtype.itemsize
    return [
        tile
        for tile in narrowed
        if tile.width >= LEAST_BLOCK_K and min(tile.rows, tile.hidden) * tile.width >= 32 * tile.num_warps * vector
    ]
