"""Compile the fold kernel ahead of time, without a GPU, and check the code: wide loads, no spills, rounding.

Run as `python -m fastlock.kernels.build`. It compiles what `jit.launch` would, from the same definitions. With
`--cubins DIRECTORY` it writes the cubins and their manifest, which `setup.py` puts into the wheel. Unless only kernels
that are shipped are asked for, it goes on with those of `build_locked_linear`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.fold.launch import DTYPES, Variant
from fastlock.kernels.fold.triton_kernel import INTERPRETED, SIGNATURE, constants, fold_kernel

ARCHS = (80, 90, 100, 120)
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)

_Wanted = TypeVar("_Wanted")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Report:
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


def variants() -> Iterator[Variant]:
    """Every variant that production launches for the head sizes of known models."""
    for dtype, transposed, head_dim, aligned in itertools.product(DTYPES, (False, True), HEAD_DIMS, (True, False)):
        yield Variant(dtype, dtype, head_dim, transposed, aligned)


def in_sample(arch: int, variant: Variant) -> bool:
    """Whether CI compiles it: three head sizes everywhere, aligned; and for bf16 on sm_90 all that there is."""
    if arch == 90 and variant.dtype == torch.bfloat16:
        return True
    return variant.aligned and variant.head_dim in (80, 128, 192)


def shipped(variant: Variant) -> bool:
    """Whether the wheel has a cubin of it: of all aligned variants.

    torch's own allocations start at multiples of 512 bytes, and every known model's heads and rows at multiples of
    16, so that plain loads are for views at odd addresses. They would double the files; Triton's JIT does them.
    """
    return variant.aligned


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        kernel: Triton's.
        elf: what cuobjdump reads in it.
        memory: bytes of one thread that should be registers, by what they are: spills, local memory, stack.
    """

    kernel: Any
    elf: _Elf
    memory: dict[str, int]


def compiled(source: ASTSource, arch: int, options: dict[str, Any]) -> Compiled:
    """Compile a kernel for one compute capability, with Triton's own ptxas.

    Of the two that Triton brings, it is the older one, for every architecture: a newer toolkit's cubins need a newer
    driver. No path of this machine gets into the code, as line numbers are left out.

    Raises:
        FastlockError: Triton was imported with TRITON_INTERPRET=1, which can't compile.
    """
    if INTERPRETED:
        raise FastlockError("Triton can't compile under TRITON_INTERPRET=1: unset it and start Python again.")
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a kernel from the cache leaves no ptxas log
        triton.knobs.compilation.disable_line_info = True
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.nvidia.ptxas_blackwell = triton.knobs.nvidia.ptxas.path
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    elf = _read_elf(kernel.asm["cubin"], kernel.metadata.name)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    if not spills:
        raise FastlockError(f"ptxas said nothing about spills:\n{log.getvalue()}")
    memory = {"spills": sum(map(int, spills)), "local memory": elf.usage["LOCAL"], "stack": elf.usage["STACK"]}
    return Compiled(kernel, elf, memory)


def compile_variant(arch: int, variant: Variant) -> Report:
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
    return Report(
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


def write_cubins(reports: Sequence[Report], directory: Path) -> cubins.Manifest:
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


def variant_named(name: str) -> Variant:
    """The variant of a name."""
    return next(variant for variant in variants() if variant.name == name)


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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every variant, not only CI's sample")
    what.add_argument("--shipped", action="store_true", help="every variant that the wheel has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports, PTX included, to this file")
    parser.add_argument("--cubins", type=Path, metavar="DIRECTORY", help="write the cubins and their manifest here")
    parser.add_argument("--jobs", type=int, default=processors(), help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted = [
        (arch, variant)
        for arch, variant in itertools.product(options.arch, variants())
        if options.all or (shipped(variant) if options.shipped else in_sample(arch, variant))
    ]
    reports = []
    print(f"{'arch':<7}{'variant':<32}{'regs':>5}{'spills':>8}{'local':>7}{'shared':>8}{'v4':>4}")
    for report in in_processes(compile_variant, wanted, options.jobs):
        reports.append(report)
        print(
            f"sm_{report.arch:<4}{report.variant:<32}{report.registers:>5}{report.spill_bytes:>8}"
            f"{report.local_bytes:>7}{report.shared_bytes:>8}{report.vector_loads:>4}  {'; '.join(report.problems)}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([report.to_json() for report in reports], indent=1))
    bad = sum(bool(report.problems) for report in reports)
    print(f"Triton {triton.__version__}: {len(reports)} kernels, {bad} with problems")
    if options.cubins:
        manifest = write_cubins(reports, options.cubins)
        size = sum(path.stat().st_size for path in options.cubins.iterdir())
        print(f"{options.cubins}: {len(manifest.cubins)} cubins, {size / 1e6:.1f} MB")
    if not options.cubins and not options.shipped:
        from fastlock.kernels.locked_linear import compile as build_locked_linear

        others = list(build_locked_linear.compile_all(options.arch, options.all, options.jobs))
        bad += build_locked_linear.conclude(others)
    return 1 if bad else 0


def in_processes(
    compile_one: Callable[[int, _Wanted], _Found], wanted: Sequence[tuple[int, _Wanted]], jobs: int
) -> Iterator[_Found]:
    """Each in turn; over several processes, as ptxas and Triton's passes use one thread each."""
    if jobs == 1:
        yield from (compile_one(arch, each) for arch, each in wanted)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_one, *zip(*wanted, strict=True), chunksize=4)


def processors() -> int:
    """How many processors this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class _Elf:
    """What cuobjdump reads in a cubin with one kernel.

    Attributes:
        target: such as 90a.
        usage: REG, STACK, SHARED and LOCAL.
        parameters: (offset, size) of each.
    """

    target: str
    usage: dict[str, int]
    parameters: tuple[tuple[int, int], ...]


def _read_elf(cubin: bytes, kernel: str) -> _Elf:
    """Read a cubin of a kernel of this name by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-elf", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    own = text.partition(f"\n.nv.info.{kernel}\n")[2].partition("\n\n\n")[0]
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", own)
    parameters = sorted(tuple(int(number, 16) for number in numbers) for numbers in found)
    (target,) = set(re.findall(r"\bsm=(\w+),", text))
    return _Elf(target, usage, tuple((offset, size) for _, offset, size in parameters))


if __name__ == "__main__":
    sys.exit(main())
