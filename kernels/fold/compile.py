"""Compile the fold kernel ahead of time, without a GPU, and check the code: wide loads, no spills, rounding.

It compiles what `triton_kernel.launch` would, from the same definitions.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.compile import compiled
from fastlock.kernels.fold.triton_kernel import SIGNATURE, constants, fold_kernel
from fastlock.kernels.fold.variants import Variant, shipped, variant_named


@dataclass(frozen=True)
class FoldReport:
    """What came out of one compilation.

    Attributes:
        arch: compute capability, 90 for sm_90.
        variant: the name of the variant.
        registers: registers of one thread.
        spill_bytes: bytes of spill stores and spill loads.
        local_bytes, stack_bytes: local memory and stack of one thread.
        shared_bytes: shared memory of one program.
        vector_loads: 16-byte loads in the code.
        problems: what is wrong with it, in words.
        ptx: the code.
        cubin: what the manifest says of the binary.
        binary: the binary.
    """

    arch: int
    variant: str
    registers: int
    spill_bytes: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    vector_loads: int
    problems: list[str]
    ptx: str = field(repr=False)
    cubin: cubins.Cubin
    binary: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but the binary."""
        return {key: value for key, value in asdict(self).items() if key != "binary"}


def in_sample(arch: int, variant: Variant) -> bool:
    """Whether CI compiles it: three head sizes everywhere, aligned; and for bf16 on sm_90 all that there is."""
    if arch == 90 and variant.dtype == torch.bfloat16:
        return True
    return variant.aligned and variant.head_dim in (80, 128, 192)


def compile_variant(arch: int, variant: Variant) -> FoldReport:
    """Compile the fold kernel for one compute capability; see `compiled`."""
    constexprs = constants(variant)
    source = ASTSource(
        fold_kernel,
        signature=SIGNATURE | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(SIGNATURE))},
    )
    found = compiled(source, arch, variant.options())
    kernel, elf, memory = found.kernel, found.elf, found.memory
    ptx = kernel.asm["ptx"]
    cubin = cubins.Cubin(
        variant=variant.name,
        target=f"sm_{elf.target}",
        file=f"{variant.name}-sm_{elf.target}.cubin",
        sha256=hashlib.sha256(kernel.asm["cubin"]).hexdigest(),
        kernel=kernel.metadata.name,
        parameters=elf.parameters,
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        registers=elf.usage["REG"],
        ptxas=triton.knobs.nvidia.ptxas.version,
    )
    return FoldReport(
        arch=arch,
        variant=variant.name,
        registers=elf.usage["REG"],
        spill_bytes=memory["spills"],
        local_bytes=elf.usage["LOCAL"],
        stack_bytes=elf.usage["STACK"],
        shared_bytes=kernel.metadata.shared,
        vector_loads=count_vector_loads(ptx),
        problems=code_problems(variant, ptx)
        + [f"{n} bytes of {what}" for what, n in memory.items() if n]
        + launch_problems(variant, cubin, kernel.metadata._asdict()),
        ptx=ptx,
        cubin=cubin,
        binary=kernel.asm["cubin"],
    )


def launch_problems(variant: Variant, cubin: cubins.Cubin, metadata: dict[str, Any]) -> list[str]:
    """What the plain launch of `cubins` could not do: scratch memory, clusters, cooperative grids, other parameters."""
    problems = []
    for key, plain in (
        ("global_scratch_size", 0),
        ("profile_scratch_size", 0),
        ("launch_cooperative_grid", False),
        ("launch_pdl", False),
        ("num_ctas", 1),
        ("num_warps", variant.num_warps),
    ):
        if metadata[key] != plain:
            problems.append(f"{key} is {metadata[key]}, not {plain}")
    # Behind the kernel's own arguments Triton passes two addresses of scratch memory.
    expected = tuple((8 * i, 8) for i in range(len(SIGNATURE) + 2))
    if cubin.parameters != expected:
        problems.append(f"its parameters are {cubin.parameters}, not {expected}")
    return problems


def write_cubins(reports: Sequence[FoldReport], directory: Path) -> cubins.Manifest:
    """Write what `shipped` ships and has no problem to a directory of its own, which is made anew.

    Raises:
        FastlockError: the directory holds something else.
    """
    if directory.exists() and any(path.suffix not in (".cubin", ".json") for path in directory.iterdir()):
        raise FastlockError(f"{directory} holds other files than cubins; name a directory of their own.")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    sound = [report for report in reports if shipped(variant_named(report.variant)) and not report.problems]
    for report in sound:
        (directory / report.cubin.file).write_bytes(report.binary)
    manifest = cubins.Manifest(triton.__version__, cubins.digest_of_sources(), tuple(report.cubin for report in sound))
    (directory / cubins.MANIFEST).write_text(manifest.to_json())
    return manifest


def expected_vector_loads(variant: Variant) -> int:
    """The 16-byte loads of one thread and head if all of W is read by them."""
    threads = 32 * variant.options()["num_warps"]
    of_weight = variant.block_rows * variant.block_columns // threads // variant.vector
    # By rows, a thread reads the values of its vector's columns: `vector` numbers of 4 bytes.
    of_values = 0 if variant.transposed else variant.vector // 4
    return int(of_weight + of_values)


def count_vector_loads(ptx: str) -> int:
    """How many 16-byte loads from global memory the code has."""
    return len(re.findall(r"\bld\.global\S*\.v4\.[bf]32\b", ptx))


def code_problems(variant: Variant, ptx: str) -> list[str]:
    """What is wrong with the code: W not read 16 bytes at a time, or the result not rounded to the nearest."""
    problems = []
    found, expected = count_vector_loads(ptx), expected_vector_loads(variant)
    if variant.aligned and found < expected:
        problems.append(f"{found} vector loads, {expected} expected")
    if variant.out_dtype != torch.float32:
        kind = "bf16" if variant.out_dtype == torch.bfloat16 else "f16"
        modes = set(re.findall(rf"\bcvt\.(\S+?)\.{kind}(?:x2)?\.f32\b", ptx))
        if modes != {"rn"}:
            problems.append(f"the result is rounded by {sorted(modes)}, not by cvt.rn alone")
    return problems
