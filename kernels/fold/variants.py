"""What the fold's kernel is compiled for, as plain data that launch and ahead-of-time build share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_HEAD_DIM = 512

# int64 numbers in one row of the site table, 64 bytes: `triton_kernel` says what they are. One is sorted by.
SITE_FIELDS, COUNT_AND_SITE = 8, 5

VECTOR_BYTES = 16

# 32 rows and two threads a column leave 16 elements of W a thread and head. Threads outnumber the columns, so
# Triton reads the values straight into the layout of W: no shared memory and no barrier, but for kinds that stage W.
# Plain loads take an address each: half the rows, or 512 threads run out of registers.
ALIGNED_ROWS = 32

PLAIN_ROWS = 16

THREADS_PER_COLUMN = 2

MIN_WARPS = 4

# What a program has of shared memory without asking the driver for more.
FREE_SHARED = 48 * 1024


@dataclass(frozen=True)
class Kind:
    """A way to read W. docs/fold-kernel.md compares them.

    Attributes:
        name: of the kind.
        heads: how many heads a step of the loop asks for before it waits.
        stages: above 1, W comes through shared memory, `stages` - 1 heads ahead; 1: into registers.
        in_thread: whether each thread sums its own products at once, which leaves more registers for loads.
        registers: of a thread, at most, for weights of 16 bits and for float32. Without a limit of its own, ptxas
            spills a few to let more programs in.
        plain: whether it can read W element by element.
    """

    name: str
    heads: int
    stages: int
    in_thread: bool
    registers: tuple[int, int]
    plain: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("serial", heads=1, stages=1, in_thread=False, registers=(64, 64), plain=True),
        Kind("lean", heads=1, stages=1, in_thread=True, registers=(40, 48)),
        Kind("pairs", heads=2, stages=1, in_thread=True, registers=(48, 64)),
        Kind("staged", heads=1, stages=3, in_thread=True, registers=(40, 48)),
    )
}

# Which kind is launched, for a dtype of weights and whether they are transposed. Chosen by the model of
# docs/fold-kernel.md; to be changed, by hand, once `bench/run.py --only fold` has timed all of them on a GPU.
DEFAULT_KINDS = {
    (torch.float16, False): "staged",
    (torch.float16, True): "staged",
    (torch.bfloat16, False): "staged",
    (torch.bfloat16, True): "staged",
    (torch.float32, False): "staged",
    (torch.float32, True): "staged",
}

# Where the default does not fit, and for plain loads.
AFTER_DEFAULT, OF_PLAIN = "lean", "serial"

# Kinds that do not fit in their registers, by what ptxas made of them: for a dtype of weights and whether they are
# transposed, the compute capabilities where 8 to 36 bytes are spilled. No cubins are made of these.
SPILLS = {
    ("pairs", torch.float16, False): (100, 120),
    ("pairs", torch.bfloat16, False): (120,),
    ("pairs", torch.float32, False): (80, 90, 100, 120),
}


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is made for.

    Attributes:
        dtype: of the weights and biases.
        out_dtype: of the results.
        head_dim: columns of one head.
        transposed: each column of a weight is contiguous in memory, not each row.
        aligned: W is read 16 bytes at a time.
        kind: how W is read, a name of KINDS.
    """

    dtype: torch.dtype
    out_dtype: torch.dtype
    head_dim: int
    transposed: bool
    aligned: bool
    kind: str

    @property
    def name(self) -> str:
        """Such as bfloat16-rows-128-aligned-staged; with out_dtype too, where it is not dtype."""
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.out_dtype))
        layout, access = "columns" if self.transposed else "rows", "aligned" if self.aligned else "plain"
        return f"{'-'.join(dtypes)}-{layout}-{self.head_dim}-{access}-{self.kind}"

    @property
    def heads(self) -> int:
        """How many heads a step of the loop asks for."""
        return KINDS[self.kind].heads

    @property
    def stages(self) -> int:
        """Of Triton's pipeline; 1: none."""
        return KINDS[self.kind].stages

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

    @property
    def most_registers(self) -> int:
        """Of one thread."""
        return KINDS[self.kind].registers[self.dtype == torch.float32]

    @property
    def bytes_a_head(self) -> int:
        """Bytes of W, masked ones included, that one program reads of one head."""
        return self.block_rows * self.block_columns * self.dtype.itemsize

    @property
    def lanes(self) -> int:
        """How many columns' products each thread sums at once: all that it reads of one head and row, or 1."""
        if not KINDS[self.kind].in_thread:
            return 1
        if not self.transposed:
            return self.vector
        return max(1, self.bytes_a_head // (32 * self.num_warps * VECTOR_BYTES))

    @property
    def heads_ahead(self) -> int:
        """How many heads of W a program has under way at most."""
        return max(self.heads, self.stages - 1)

    @property
    def misfit(self) -> str:
        """Why this kind cannot read such weights; empty if it can."""
        kind = KINDS[self.kind]
        if not self.aligned and not kind.plain:
            return "it reads 16 bytes at a time, and the weights are not aligned to that"
        staged = (kind.stages - 1) * self.bytes_a_head
        if staged >= FREE_SHARED:
            return f"it would take {staged // 1024} KB of shared memory, and has less than {FREE_SHARED // 1024}"
        return ""

    @property
    def spills_on(self) -> tuple[int, ...]:
        """The compute capabilities for which it does not fit in its registers, such as 120."""
        return SPILLS.get((self.kind, self.dtype, self.transposed), ())

    def options(self) -> dict[str, Any]:
        """Triton's compile options. Fusion is set because its default is not the same in every Triton."""
        return {"num_warps": self.num_warps, "maxnreg": self.most_registers, "enable_fp_fusion": True}


def default_variant(
    dtype: torch.dtype, out_dtype: torch.dtype, head_dim: int, transposed: bool, aligned: bool
) -> Variant:
    """The variant that is launched where nobody asks for a kind."""
    kind = DEFAULT_KINDS[dtype, transposed] if aligned else OF_PLAIN
    variant = Variant(dtype, out_dtype, head_dim, transposed, aligned, kind)
    return replace(variant, kind=AFTER_DEFAULT) if variant.misfit else variant


def is_default(variant: Variant) -> bool:
    """Whether it is launched where nobody asks for a kind."""
    return variant == default_variant(
        variant.dtype, variant.out_dtype, variant.head_dim, variant.transposed, variant.aligned
    )


HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)


def variants() -> Iterator[Variant]:
    """Every variant that can be launched for the head sizes of known models."""
    for dtype, transposed, head_dim, aligned, kind in itertools.product(
        DTYPES, (False, True), HEAD_DIMS, (True, False), KINDS
    ):
        variant = Variant(dtype, dtype, head_dim, transposed, aligned, kind)
        if not variant.misfit:
            yield variant


def shipped(variant: Variant) -> bool:
    """Whether wheels have a cubin of it: they have the default of all aligned ones, and what the benchmark times.

    torch's own allocations start at multiples of 512 bytes, and every known model's heads and rows at multiples of 16:
    plain loads are for views at odd addresses. They would double the files; Triton's JIT does them.
    """
    timed = (variant.dtype, variant.head_dim, variant.transposed) == (torch.bfloat16, 128, False)
    return variant.aligned and (timed or is_default(variant))
