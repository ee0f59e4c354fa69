"""What the kernel for adapters is compiled for, as plain data that launch and ahead-of-time build share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_RANK = 256

# int64 numbers in one row of the site table, 128 bytes: `triton_kernel` says what they are.
SITE_FIELDS = 16

VECTOR_BYTES = 16

# A step of the loop takes so many ranks: most adapters have 8, 16 or 32.
RANKS = 16
# And so many columns of A at a time, which is a head of most models.
COLUMNS = 128
# 512 rows of B are 16 KB of 16-bit numbers, four loads of 16 bytes for each of 256 threads. A program reads the locked
# columns of A as well, 8 KB at rank 16 and two heads, which seven of eight find in the L2: larger blocks would read
# less there, and leave too few programs for one adapter. Reasoned, not measured. Plain loads take an address each: of
# more rows, 256 threads run out of registers.
ALIGNED_ROWS, PLAIN_ROWS = 512, 128
NUM_WARPS = 8
MOST_REGISTERS = 128


@dataclass(frozen=True)
class AdapterVariant:
    """What one compiled kernel is made for. The rank and the size of a head are no part of it.

    Attributes:
        dtype: of A, B and β.
        out_dtype: of the results.
        aligned: A and B are read 16 bytes at a time: their rows are contiguous, and start and end at multiples of that.
    """

    dtype: torch.dtype
    out_dtype: torch.dtype
    aligned: bool

    @property
    def name(self) -> str:
        """Such as adapters-bfloat16-bfloat16-aligned."""
        dtypes = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.out_dtype))
        return "-".join(["adapters", *dtypes, "aligned" if self.aligned else "plain"])

    @property
    def vector(self) -> int:
        """How many elements make one 16-byte load."""
        return VECTOR_BYTES // self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """Rows of one program."""
        return ALIGNED_ROWS if self.aligned else PLAIN_ROWS

    def options(self) -> dict[str, Any]:
        """Triton's compile options. Fusion is set because its default is not the same in every Triton."""
        return {"num_warps": NUM_WARPS, "maxnreg": MOST_REGISTERS, "enable_fp_fusion": True}


def adapter_variants() -> Iterator[AdapterVariant]:
    """Every variant that can be launched."""
    for dtype, out_dtype, aligned in itertools.product(DTYPES, DTYPES, (True, False)):
        yield AdapterVariant(dtype, out_dtype, aligned)


def is_shipped(variant: AdapterVariant) -> bool:
    """Whether wheels have a cubin of it: aligned, and an adapter in its base's dtype, or in float32 as PEFT trains it.

    Triton's JIT does the rest: adapters of rank 4, say, whose rows of B are 8 bytes.
    """
    return variant.aligned and variant.dtype in (variant.out_dtype, torch.float32)
