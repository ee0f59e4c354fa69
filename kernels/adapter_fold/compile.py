"""Compile the kernel for adapters without a GPU, and check the code: wide loads, rounding, no spills.

It compiles what `triton_kernel.launch` would, from the same definitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fastlock.kernels.adapter_fold.triton_kernel import SIGNATURE, adapter_fold_kernel, constants
from fastlock.kernels.adapter_fold.variants import (
    COLUMNS,
    NUM_WARPS,
    RANKS,
    VECTOR_BYTES,
    AdapterVariant,
    adapter_variants,
    is_shipped,
)
from fastlock.kernels.ahead_of_time.compile import (
    Op,
    Report,
    compile_kernel,
    count_wide_loads,
    launch_problems,
    programs_at_once,
    rounding_problems,
)

# What a report counts: loads of 16 bytes, and programs on a multiprocessor at once.
WIDE_LOADS, PROGRAMS = "v4", "CTAs/SM"


def every(arch: int) -> Iterator[AdapterVariant]:
    """All that production may launch; the same for every compute capability."""
    return adapter_variants()


def shipped(arch: int) -> Iterator[AdapterVariant]:
    """Those that a wheel has as cubins."""
    return filter(is_shipped, every(arch))


def sample(arch: int) -> Iterator[AdapterVariant]:
    """What CI compiles: bfloat16 everywhere, aligned; on sm_90 plain too, and float32 adapters."""
    aligned = AdapterVariant(torch.bfloat16, torch.bfloat16, aligned=True)
    yield aligned
    if arch == 90:
        yield replace(aligned, aligned=False)
        yield replace(aligned, dtype=torch.float32)


def compile_variant(arch: int, variant: AdapterVariant) -> Report:
    """Compile the kernel for one compute capability; see `compile_kernel`."""
    aligned = [True] * len(SIGNATURE)
    compiled = compile_kernel(adapter_fold_kernel, arch, SIGNATURE, constants(variant), aligned, variant.options())
    cubin = compiled.cubin(variant.name)
    problems = code_problems(variant, compiled.ptx)
    problems += launch_problems(cubin, compiled.kernel.metadata._asdict(), len(SIGNATURE), NUM_WARPS)
    programs = programs_at_once(arch, compiled.usage["REG"], compiled.kernel.metadata.shared, NUM_WARPS)
    return compiled.report(
        arch,
        variant.name,
        {WIDE_LOADS: count_wide_loads(compiled.ptx), PROGRAMS: programs},
        problems,
        cubin=cubin if is_shipped(variant) else None,
        binary=compiled.kernel.asm["cubin"],
    )


def expected_wide(variant: AdapterVariant) -> int:
    """The 16-byte loads of one thread, if all of A and B is read by them."""
    of_a_vector = 32 * NUM_WARPS * VECTOR_BYTES // variant.dtype.itemsize
    return max(1, variant.block_rows * RANKS // of_a_vector) + max(1, RANKS * COLUMNS // of_a_vector)


def code_problems(variant: AdapterVariant, ptx: str) -> list[str]:
    """What is wrong with the code: A or B not read 16 bytes at a time, or the result not rounded to the nearest."""
    problems = []
    if variant.aligned and count_wide_loads(ptx) < expected_wide(variant):
        problems.append(f"{count_wide_loads(ptx)} vector loads, {expected_wide(variant)} expected")
    return problems + rounding_problems(ptx, variant.out_dtype)


OP = Op(
    name="adapter_fold",
    sample=sample,
    every=every,
    shipped=shipped,
    compile=compile_variant,
    counted=(WIDE_LOADS, PROGRAMS),
)
