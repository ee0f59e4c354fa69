"""The ways to compute the projection with a lock per row, as plain data: tiles, and which to try for a shape."""

from __future__ import annotations

from collections.abc import Iterable
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

# Few rows: the time is that of reading W. There are as many programs as the GPU has processors (132 on an H100, hidden
# 4096 and up), and each keeps tens of kilobytes of W in flight.
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


def bucket(rows: int) -> int:
    """The number of rows, rounded up to a power of two, between FEWEST_ROWS and MOST_ROWS."""
    return int(min(max(1 << (rows - 1).bit_length(), FEWEST_ROWS), MOST_ROWS))


def ways(dtype: torch.dtype, rows: int, head_dim: int, major: int, shared_bytes: int) -> list[Way]:
    """The ways for a shape on a device; of equally fast ones the first is taken.

    Args:
        dtype: of x and W.
        rows: of x.
        head_dim: columns of one head.
        major: of the device's compute capability.
        shared_bytes: shared memory that one program may have there.
    """
    fitting = tiles(dtype, rows, major, shared_bytes)
    by_triton = [Way("gather", tile) for tile in fitting]
    by_triton += [Way("shift", tile) for tile in shift_tiles(fitting, head_dim, dtype)]
    by_cublas = [Way("around"), Way("add")]
    # Another launch costs some microseconds, and a projection of few rows does not take many more.
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
