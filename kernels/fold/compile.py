"""Compile the fold kernel without a GPU, and check the code: wide loads, rounding, and what a plain launch can do.

It compiles what `triton_kernel.launch` would, from the same definitions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlock.kernels.ahead_of_time.compile import (
    Compiled,
    Op,
    Report,
    compile_kernel,
    count_wide_copies,
    count_wide_loads,
    launch_problems,
    programs_at_once,
    rounding_problems,
)
from fastlock.kernels.fold.triton_kernel import SIGNATURE, constants, fold_kernel
from fastlock.kernels.fold.variants import Variant, is_default, shipped, variants

# What a report counts: loads and copies of 16 bytes, programs on a multiprocessor at once, and the KB of W that these
# have under way at most.
WIDE_LOADS, WIDE_COPIES, PROGRAMS, UNDER_WAY = "v4", "async", "CTAs/SM", "KB/SM"


def sample(arch: int) -> Iterator[Variant]:
    """What CI compiles of the defaults: three head sizes everywhere, aligned; and for bfloat16 on sm_90 all there are.

    Of the other kinds: one head size everywhere, and on sm_90 two.
    """
    for variant in every(arch):
        if is_default(variant):
            of_all = arch == 90 and variant.dtype == torch.bfloat16
            sampled = of_all or (variant.aligned and variant.head_dim in (80, 128, 192))
        else:
            sampled = variant.aligned and variant.head_dim in ((80, 128) if arch == 90 else (128,))
        if sampled:
            yield variant


def every(arch: int) -> Iterator[Variant]:
    """All that fits a compute capability."""
    return (variant for variant in variants() if arch not in variant.spills_on)


def compile_variant(arch: int, variant: Variant) -> Report:
    """Compile the fold kernel for one compute capability; see `compile_kernel`."""
    aligned = [True] * len(SIGNATURE)
    compiled = compile_kernel(fold_kernel, arch, SIGNATURE, constants(variant), aligned, variant.options())
    cubin = compiled.cubin(variant.name)
    problems = code_problems(variant, compiled.ptx)
    problems += launch_problems(cubin, compiled.kernel.metadata._asdict(), len(SIGNATURE), variant.num_warps)
    return compiled.report(
        arch,
        variant.name,
        counts_of(arch, variant, compiled),
        problems,
        cubin=cubin if shipped(variant) else None,
        binary=compiled.kernel.asm["cubin"],
    )


def counts_of(arch: int, variant: Variant, compiled: Compiled) -> dict[str, int]:
    """What is counted in the code, and what follows from its registers and shared memory."""
    shared = compiled.kernel.metadata.shared
    programs = programs_at_once(arch, compiled.usage["REG"], shared, variant.num_warps)
    return {
        WIDE_LOADS: count_wide_loads(compiled.ptx),
        WIDE_COPIES: count_wide_copies(compiled.ptx),
        PROGRAMS: programs,
        UNDER_WAY: programs * variant.heads_ahead * variant.bytes_a_head // 1024,
    }


def expected_wide(variant: Variant) -> tuple[int, int]:
    """The loads and the copies of 16 bytes in the code of one thread, if all of W is read by them.

    A loop that stages has its copies once before it for each head that it is ahead, and once inside.
    """
    threads = 32 * variant.num_warps
    of_weight = variant.block_rows * variant.block_columns // threads // variant.vector
    if variant.stages > 1:
        return 0, variant.stages * of_weight
    # By rows, a thread reads the values of its vector's columns: `vector` numbers of 4 bytes.
    of_values = 0 if variant.transposed else variant.vector // 4
    return variant.heads * (of_weight + of_values), 0


def code_problems(variant: Variant, ptx: str) -> list[str]:
    """What is wrong with the code: W not read 16 bytes at a time, or the result not rounded to the nearest."""
    problems = []
    loads, copies = expected_wide(variant)
    if variant.aligned and count_wide_loads(ptx) < loads:
        problems.append(f"{count_wide_loads(ptx)} vector loads, {loads} expected")
    if variant.aligned and count_wide_copies(ptx) < copies:
        problems.append(f"{count_wide_copies(ptx)} copies of 16 bytes, {copies} expected")
    return problems + rounding_problems(ptx, variant.out_dtype)


OP = Op(
    name="fold",
    sample=sample,
    every=every,
    shipped=lambda arch: filter(shipped, every(arch)),
    compile=compile_variant,
    counted=(WIDE_LOADS, WIDE_COPIES, PROGRAMS, UNDER_WAY),
)
