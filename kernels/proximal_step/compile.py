"""Compile the step's kernels without a GPU, and check the code: all read and written once, 16 bytes at a time.

It compiles what `triton_kernel.launch` would, from the same definitions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

import torch

from fastlock.kernels.ahead_of_time.compile import (
    Op,
    Report,
    compile_kernel,
    count_wide_loads,
    launch_problems,
    rounding_problems,
)
from fastlock.kernels.proximal_step.triton_kernel import SIGNATURE, constants, kernel_of
from fastlock.kernels.proximal_step.variants import (
    MOST_REGISTERS,
    NUM_WARPS,
    THREADS,
    VECTOR_BYTES,
    NormVariant,
    StepVariant,
    norm_variants,
    step_variants,
)

Variant: TypeAlias = "StepVariant | NormVariant"
WIDE_LOADS, WIDE_STORES = "v4", "stores"
SAMPLE = (
    "step-float32-float32-float32",
    "step-bfloat16-float32-bfloat16",
    "step-bfloat16-bfloat16-bfloat16-stochastic",
    "norm-bfloat16-bfloat16-2048",
)


def every(arch: int) -> Iterator[Variant]:
    """All that production launches; the same for every compute capability. Wheels have all of it."""
    yield from step_variants()
    yield from norm_variants()


def sample(arch: int) -> Iterator[Variant]:
    """What CI compiles: on sm_90 all with a term, elsewhere some."""
    for variant in every(arch):
        if variant.name in SAMPLE or (arch == 90 and variant.anchor is not None):
            yield variant


def compile_variant(arch: int, variant: Variant) -> Report:
    """Compile one kernel for one compute capability; see `compile_kernel`."""
    aligned = [True] * len(SIGNATURE)
    compiled = compile_kernel(kernel_of(variant), arch, SIGNATURE, constants(variant), aligned, variant.options())
    cubin = compiled.cubin(variant.name)
    problems = code_problems(variant, compiled.ptx)
    problems += launch_problems(cubin, compiled.kernel.metadata._asdict(), len(SIGNATURE), NUM_WARPS)
    return compiled.report(
        arch,
        variant.name,
        {WIDE_LOADS: count_wide_loads(compiled.ptx), WIDE_STORES: count_wide_stores(compiled.ptx)},
        problems,
        cubin=cubin,
        binary=compiled.kernel.asm["cubin"],
    )


def expected_wide(variant: Variant) -> tuple[int, int]:
    """The 16-byte loads and stores of one thread, if each byte of a full block is read once and written once."""
    elements = variant.block // THREADS
    written = variant.bytes_written if isinstance(variant, StepVariant) else 0
    return elements * variant.bytes_read // VECTOR_BYTES, elements * written // VECTOR_BYTES


def code_problems(variant: Variant, ptx: str) -> list[str]:
    """What is wrong with the code: full blocks that are not moved 16 bytes at a time, or rounding."""
    problems = []
    for what, count, expected in zip(
        ("loads", "stores"), (count_wide_loads(ptx), count_wide_stores(ptx)), expected_wide(variant), strict=True
    ):
        if count != expected:
            problems.append(f"{count} {what} of 16 bytes, {expected} expected")
    if isinstance(variant, StepVariant):
        narrow = torch.bfloat16 in (variant.weight, variant.state)
        problems += rounding_problems(ptx, torch.bfloat16) if narrow else []
        registers = re.findall(r"\.maxnreg (\d+)", ptx)
        problems += [] if registers == [str(MOST_REGISTERS)] else [f"its limit of registers is {registers}"]
    return problems


def count_wide_stores(ptx: str) -> int:
    """How many 16-byte stores to global memory the code has."""
    return len(re.findall(r"\bst\.global\S*\.v4\.[bf]32\b", ptx))


OP = Op(
    name="proximal_step",
    sample=sample,
    every=every,
    shipped=every,
    compile=compile_variant,
    counted=(WIDE_LOADS, WIDE_STORES),
)
