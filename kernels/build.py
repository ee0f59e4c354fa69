"""Compile the fold kernel ahead of time, without a GPU, and check the code: wide loads, no spills, rounding.

Run as `python -m fastlock.kernels.build`. It compiles what `fold.launch` would, from the same definitions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlock.errors import FastlockError
from fastlock.kernels.fold import DTYPES, INTERPRETED, SIGNATURE, Variant, fold_kernel

ARCHS = (80, 90, 100, 120)
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)


@dataclass(frozen=True)
class Report:
    """What came out of one compilation.

    Attributes:
        arch: compute capability, 90 for sm_90.
        variant: the name of the variant, see `name_of`.
        registers: registers of one thread.
        spill_bytes: bytes of spill stores and spill loads.
        local_bytes, stack_bytes: local memory and stack of one thread.
        shared_bytes: shared memory of one program.
        vector_loads: 16-byte loads in the code.
        problems: what is wrong with it, in words.
        ptx: the code.
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


def variants() -> Iterator[Variant]:
    """Every variant that production launches for the head sizes of known models."""
    for dtype, transposed, head_dim, aligned in itertools.product(DTYPES, (False, True), HEAD_DIMS, (True, False)):
        yield Variant(dtype, dtype, head_dim, transposed, aligned)


def in_sample(arch: int, variant: Variant) -> bool:
    """Whether CI compiles it: three head sizes everywhere, aligned; and for bf16 on sm_90 all that there is."""
    if arch == 90 and variant.dtype == torch.bfloat16:
        return True
    return variant.aligned and variant.head_dim in (80, 128, 192)


def name_of(variant: Variant) -> str:
    """The name of a variant, such as bfloat16-rows-128-aligned."""
    layout = "columns" if variant.transposed else "rows"
    dtype = str(variant.dtype).removeprefix("torch.")
    return f"{dtype}-{layout}-{variant.head_dim}-{'aligned' if variant.aligned else 'plain'}"


def compile_variant(arch: int, variant: Variant) -> Report:
    """Compile the fold kernel for one compute capability, with Triton's own ptxas.

    Raises:
        FastlockError: Triton was imported with TRITON_INTERPRET=1, which can't compile.
    """
    if INTERPRETED:
        raise FastlockError("Triton can't compile under TRITON_INTERPRET=1: unset it and start Python again.")
    constants = variant.constants()
    source = ASTSource(
        fold_kernel,
        signature=SIGNATURE | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(SIGNATURE))},
    )
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a kernel from the cache leaves no ptxas log
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options())
    usage = _resource_usage(kernel.asm["cubin"])
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    if not spills:
        raise FastlockError(f"ptxas said nothing about spills:\n{log.getvalue()}")
    ptx = kernel.asm["ptx"]
    memory = {"spills": sum(map(int, spills)), "local memory": usage["LOCAL"], "stack": usage["STACK"]}
    return Report(
        arch=arch,
        variant=name_of(variant),
        registers=usage["REG"],
        spill_bytes=memory["spills"],
        local_bytes=usage["LOCAL"],
        stack_bytes=usage["STACK"],
        shared_bytes=kernel.metadata.shared,
        vector_loads=count_vector_loads(ptx),
        problems=code_problems(variant, ptx) + [f"{n} bytes of {what}" for what, n in memory.items() if n],
        ptx=ptx,
    )


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table, and return 1 if any kernel has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fastlock.kernels.build", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="every variant, not only CI's sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports, PTX included, to this file")
    options = parser.parse_args(arguments)
    reports = []
    print(f"{'arch':<7}{'variant':<32}{'regs':>5}{'spills':>8}{'local':>7}{'shared':>8}{'v4':>4}")
    for arch, variant in itertools.product(options.arch, variants()):
        if options.all or in_sample(arch, variant):
            report = compile_variant(arch, variant)
            reports.append(report)
            print(
                f"sm_{arch:<4}{report.variant:<32}{report.registers:>5}{report.spill_bytes:>8}{report.local_bytes:>7}"
                f"{report.shared_bytes:>8}{report.vector_loads:>4}  {'; '.join(report.problems)}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    bad = sum(bool(report.problems) for report in reports)
    print(f"Triton {triton.__version__}: {len(reports)} kernels, {bad} with problems")
    return 1 if bad else 0


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    sys.exit(main())
