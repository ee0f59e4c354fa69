"""Compile the kernel for gates without a GPU, and check the code: what is wide, what is rounded, and no spills.

It compiles what `triton_kernel.launch` would, from the same definitions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from fastlock.kernels.ahead_of_time.compile import (
    Op,
    Report,
    compile_kernel,
    count_wide_copies,
    launch_problems,
    programs_at_once,
    rounding_problems,
)
from fastlock.kernels.gate_fold.triton_kernel import SIGNATURE, constants, gate_fold_kernel
from fastlock.kernels.gate_fold.variants import NUM_WARPS, GateVariant, gate_variants, is_shipped

# What a report counts: copies of 16 bytes into shared memory, stores of 16 bytes, programs on a multiprocessor at once,
# and the KB of W that one has in the cache for each 1024 locked columns.
WIDE_COPIES, WIDE_STORES, PROGRAMS, CACHED = "async", "stores", "CTAs/SM", "KB/1024"


def every(arch: int) -> Iterator[GateVariant]:
    """All that production may launch; the same for every compute capability."""
    return gate_variants()


def shipped(arch: int) -> Iterator[GateVariant]:
    """Those that a wheel has as cubins."""
    return filter(is_shipped, every(arch))


def sample(arch: int) -> Iterator[GateVariant]:
    """What CI compiles: bfloat16 of one lane everywhere; on sm_90 float16 of two lanes in long pieces, too."""
    yield GateVariant(torch.bfloat16, 1, transposed=False, aligned=True, shape="narrow")
    if arch == 90:
        yield GateVariant(torch.float16, 2, transposed=False, aligned=True, shape="wide")


def compile_variant(arch: int, variant: GateVariant) -> Report:
    """Compile the kernel for one compute capability; see `compile_kernel`."""
    aligned = [True] * len(SIGNATURE)
    compiled = compile_kernel(gate_fold_kernel, arch, SIGNATURE, constants(variant), aligned, variant.options())
    cubin = compiled.cubin(variant.name)
    problems = code_problems(variant, compiled.ptx)
    problems += launch_problems(cubin, compiled.kernel.metadata._asdict(), len(SIGNATURE), NUM_WARPS)
    programs = programs_at_once(arch, compiled.usage["REG"], compiled.kernel.metadata.shared, NUM_WARPS)
    counts = {
        WIDE_COPIES: count_wide_copies(compiled.ptx),
        WIDE_STORES: count_wide_stores(compiled.ptx),
        PROGRAMS: programs,
        CACHED: programs * variant.block_rows * variant.dtype.itemsize,
    }
    return compiled.report(
        arch,
        variant.name,
        counts,
        problems,
        cubin=cubin if is_shipped(variant) else None,
        binary=compiled.kernel.asm["cubin"],
    )


def expected_wide(variant: GateVariant) -> tuple[int, int]:
    """The copies and the stores of 16 bytes in the code of one thread, if all of W is read and written by them.

    Each of the two loops has its copies once before it for each chunk that it is ahead, and once inside; the second
    stores what is new and what is kept.
    """
    of_weight = variant.elements // variant.vector
    return 2 * variant.stages * of_weight, 2 * of_weight


def code_problems(variant: GateVariant, ptx: str) -> list[str]:
    """What is wrong with the code: W not read or written 16 bytes at a time, or a result not rounded to the nearest."""
    problems = []
    copies, stores = expected_wide(variant)
    if variant.aligned and count_wide_copies(ptx) < copies:
        problems.append(f"{count_wide_copies(ptx)} copies of 16 bytes, {copies} expected")
    if variant.aligned and count_wide_stores(ptx) != stores:
        problems.append(f"{count_wide_stores(ptx)} stores of 16 bytes, {stores} expected")
    return problems + rounding_problems(ptx, variant.dtype)


def count_wide_stores(ptx: str) -> int:
    """How many 16-byte stores to global memory the code has."""
    return len(re.findall(r"\bst\.global\S*\.v4\.[bf]32\b", ptx))


OP = Op(
    name="gate_fold",
    sample=sample,
    every=every,
    shipped=shipped,
    compile=compile_variant,
    counted=(WIDE_COPIES, WIDE_STORES, PROGRAMS, CACHED),
)
