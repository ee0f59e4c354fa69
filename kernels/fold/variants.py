"""What the fold's kernel is compiled for, as plain data that launch and ahead-of-time build share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_HEAD_DIM = 512

# int64 numbers in one row of the site table: `triton_kernel` says what they are.
SITE_FIELDS = 6

VECTOR_BYTES = 16

# 32 rows and two threads a column leave 16 elements of W a thread and head. Threads outnumber the columns, so
# Triton reads the values straight into the layout of W: no shared memory and no barrier in the loop over heads.
# A Llama-3-8B lock (12 sites, 4096 rows, 24 heads, bf16) gives 1536 programs of 8 warps. At 64 registers or fewer,
# 4 or more of them fit an SM: 32 KB of W in flight, more than the 18 KB that latency times bandwidth asks of an
# H100's SM (3.35 TB/s over 132, 0.7 us), in about three waves. Reasoned from the compiled code, not measured.
# Plain loads take an address each: half the rows, or 512 threads run out of registers.
ALIGNED_ROWS = 32

PLAIN_ROWS = 16

THREADS_PER_COLUMN = 2

MIN_WARPS = 4

MOST_REGISTERS = 64


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is made for.

    Attributes:
        dtype: of the weights and biases.
        out_dtype: of the results.
        head_dim: columns of one head.
        transposed: each column of a weight is contiguous in memory, not each row.
        aligned: W is read 16 bytes at a time.
    """

    dtype: torch.dtype
    out_dtype: torch.dtype
    head_dim: int
    transposed: bool
    aligned: bool

    @property
    def name(self) -> str:
        """Such as bfloat16-rows-128-aligned; with out_dtype too, where it is not dtype."""
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.out_dtype))
        layout, access = "columns" if self.transposed else "rows", "aligned" if self.aligned else "plain"
        return f"{'-'.join(dtypes)}-{layout}-{self.head_dim}-{access}"

    @property
    def vector(self) -> int:
        """How many elements of the weight make one 16-byte load."""
        return VECTOR_BYTES // self.dtype.itemsize

    @property
    def block_columns(self) -> int:
        """head_dim, rounded up to a power of two."""
        return int(1 << (self.head_dim - 1).bit_length())

    @property
    def block_rows(self) -> int:
        """Rows of one program."""
        return ALIGNED_ROWS if self.aligned else PLAIN_ROWS

    @property
    def num_warps(self) -> int:
        """Of one program, 32 threads each."""
        return max(MIN_WARPS, self.block_columns * THREADS_PER_COLUMN // 32)

    def options(self) -> dict[str, Any]:
        """Triton's compile options. Fusion is set because its default is not the same in every Triton.

        Without a limit of its own, ptxas spills a few registers to come to a number that lets more programs in.
        """
        return {"num_warps": self.num_warps, "maxnreg": MOST_REGISTERS, "enable_fp_fusion": True}


HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)


def variants() -> Iterator[Variant]:
    """Every variant that production launches for the head sizes of known models."""
    for dtype, transposed, head_dim, aligned in itertools.product(DTYPES, (False, True), HEAD_DIMS, (True, False)):
        yield Variant(dtype, dtype, head_dim, transposed, aligned)


def shipped(variant: Variant) -> bool:
    """Whether wheels have a cubin of it: they have all aligned variants.

    torch's own allocations start at multiples of 512 bytes, and every known model's heads and rows at multiples of 16:
    plain loads are for views at odd addresses. They would double the files; Triton's JIT does them.
    """
    return variant.aligned
