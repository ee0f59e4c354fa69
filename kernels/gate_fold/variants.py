"""What the kernel for gates is compiled for, and what lies where in its tables: plain data for launch and build."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# int64 numbers in one row of the site table, and in one of the chunk table; float32 vectors of one chunk, for each of
# LANES.
SITE_FIELDS, CHUNK_FIELDS, CHUNK_VECTORS = 12, 4, 2

VECTOR_BYTES = 16

NUM_WARPS = 8
# Vectors that W is multiplied by at once: a gate's writers, and a displacement. Fewer are filled up with zeros.
LANES = (1, 2, 4, 8)
MAX_LANES = LANES[-1]
# Of one thread, by shape and lanes, where 16-bit weights are read 16 bytes at a time; MORE_REGISTERS for all others.
# With fewer, Triton 3.6 spills in "wide" with two lanes, and 3.7 in "narrow" with four.
MOST_REGISTERS = {"narrow": {1: 80, 2: 80, 4: 128, 8: 96}, "wide": {1: 80, 2: 96, 4: 128, 8: 96}}
MORE_REGISTERS = 128
# Of Triton's pipeline where W is read 16 bytes at a time.
STAGES = 3


@dataclass(frozen=True)
class Shape:
    """How much of W a program takes at a time: `rows` rows of `columns` columns that lie side by side."""

    rows: int
    columns: int


# 16 numbers of W a thread. "wide" is for many columns side by side: the rows that a multiprocessor has under way must
# still be in the cache when they are read again.
SHAPES = {"narrow": Shape(32, 128), "wide": Shape(4, 1024)}
# From so many locked columns of one site on, wide is considered, and launched where at most so many times the columns
# would be asked for.
WIDE_FROM, MOST_WASTED = 512, 1.25


@dataclass(frozen=True)
class GateVariant:
    """What one compiled kernel is made for. The size of a head is no part of it.

    Attributes:
        dtype: of the weights, biases and results.
        lanes: how many vectors W is multiplied by, one of LANES.
        transposed: each column of a weight is contiguous in memory, not each row.
        aligned: all weights are read and written 16 bytes at a time.
        shape: a name of SHAPES.
    """

    dtype: torch.dtype
    lanes: int
    transposed: bool
    aligned: bool
    shape: str

    @property
    def name(self) -> str:
        """Such as gates-bfloat16-rows-1-aligned-narrow."""
        dtype = str(self.dtype).removeprefix("torch.")
        layout, access = "columns" if self.transposed else "rows", "aligned" if self.aligned else "plain"
        return f"gates-{dtype}-{layout}-{self.lanes}-{access}-{self.shape}"

    @property
    def vector(self) -> int:
        """How many elements make one 16-byte load."""
        return VECTOR_BYTES // self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """Rows of one program. Plain loads take an address each: half the rows, or the registers run out."""
        return SHAPES[self.shape].rows // (1 if self.aligned else 2)

    @property
    def block_columns(self) -> int:
        """Columns of one chunk."""
        return SHAPES[self.shape].columns

    @property
    def elements(self) -> int:
        """Numbers of W that one thread takes at a time."""
        return self.block_rows * self.block_columns // (32 * NUM_WARPS)

    @property
    def summed(self) -> int:
        """How many products of one row each thread sums at once: all that it has of a chunk, or 1 if not aligned."""
        if not self.aligned:
            return 1
        return self.elements // self.vector if self.transposed else self.vector

    @property
    def stages(self) -> int:
        """Of Triton's pipeline; 1: none."""
        return STAGES if self.aligned else 1

    @property
    def most_registers(self) -> int:
        """Of one thread."""
        narrow = self.aligned and self.dtype.itemsize == 2
        return MOST_REGISTERS[self.shape][self.lanes] if narrow else MORE_REGISTERS

    def options(self) -> dict[str, Any]:
        """Triton's compile options. Fusion is set because its default is not the same in every Triton."""
        return {"num_warps": NUM_WARPS, "maxnreg": self.most_registers, "enable_fp_fusion": True}


def lanes_for(vectors: int) -> int | None:
    """How many lanes so many vectors take; None: more than there are."""
    return next((lanes for lanes in LANES if lanes >= vectors), None)


def gate_variants() -> Iterator[GateVariant]:
    """Every variant that can be launched."""
    for dtype, lanes, transposed, aligned, shape in itertools.product(
        DTYPES, LANES, (False, True), (True, False), SHAPES
    ):
        if shape == "narrow" or (aligned and not transposed):
            yield GateVariant(dtype, lanes, transposed, aligned, shape)


def is_shipped(variant: GateVariant) -> bool:
    """Whether wheels have a cubin of it: 16-bit weights by rows, aligned, and four vectors at most.

    Triton's JIT does the rest: GPT-2's columns, say, or rank 8.
    """
    return variant.aligned and not variant.transposed and variant.dtype != torch.float32 and variant.lanes <= 4
