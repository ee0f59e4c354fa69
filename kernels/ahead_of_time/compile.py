"""Compile kernels without a GPU, and read what came out: registers, spills, parameters, and the code itself.

What an op is compiled for, and what its code must look like, its own compile.py says; `build` runs them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time.manifest import MANIFEST, Cubin, Manifest, digest_of_sources

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Multiprocessor:
    """What one has for all programs that run on it at once; `shared` in bytes."""

    programs: int
    warps: int
    shared: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(32, 64, 164 * 1024),
    86: Multiprocessor(16, 48, 100 * 1024),
    89: Multiprocessor(24, 48, 100 * 1024),
    90: Multiprocessor(32, 64, 228 * 1024),
    100: Multiprocessor(32, 64, 228 * 1024),
    120: Multiprocessor(24, 48, 100 * 1024),
}
# True where TRITON_INTERPRET=1 was set when this module was imported: Triton cannot compile then.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_Job = TypeVar("_Job")


@dataclass(frozen=True)
class Report:
    """What came out of one compilation.

    Attributes:
        arch: compute capability, 90 for sm_90.
        kernel: the name of what was compiled.
        registers: registers of one thread.
        spill_bytes: bytes of spill stores and spill loads.
        local_bytes, stack_bytes: local memory and stack of one thread.
        shared_bytes: shared memory of one program.
        counts: how often the code has what the op counts, such as 16-byte loads.
        problems: what is wrong with it, in words.
        ptx: the code.
        cubin: what the manifest is to say of the binary; None if no wheel has it.
        binary: the binary.
    """

    arch: int
    kernel: str
    registers: int
    spill_bytes: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    counts: dict[str, int]
    problems: list[str]
    ptx: str = field(repr=False)
    cubin: Cubin | None = None
    binary: bytes = field(default=b"", repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but the binary."""
        return {key: value for key, value in asdict(self).items() if key != "binary"}


@dataclass(frozen=True)
class Op(Generic[_Job]):
    """An op's kernels, as `build` compiles them.

    Attributes:
        name: its folder's.
        sample: what CI compiles for a compute capability.
        every: all that production may launch there.
        shipped: those that a wheel has as cubins.
        compile: compiles one for a compute capability. It and its jobs can be sent to other processes.
        counted: the names of its reports' counts.
    """

    name: str
    sample: Callable[[int], Iterable[_Job]]
    every: Callable[[int], Iterable[_Job]]
    shipped: Callable[[int], Iterable[_Job]]
    compile: Callable[[int, _Job], Report]
    counted: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        kernel: Triton's.
        target: what ptxas compiled for, such as 90a.
        usage: what cuobjdump reads in it: REG, STACK, SHARED and LOCAL.
        parameters: (offset, size) in bytes of each of the kernel's parameters.
        spills: bytes of spill stores and spill loads.
    """

    kernel: Any
    target: str
    usage: dict[str, int]
    parameters: tuple[tuple[int, int], ...]
    spills: int

    @property
    def ptx(self) -> str:
        """The code."""
        text: str = self.kernel.asm["ptx"]
        return text

    def report(self, arch: int, name: str, counts: Mapping[str, int], problems: Sequence[str], **more: Any) -> Report:
        """What came out, with the bytes among the problems that should have been registers."""
        memory = {"spills": self.spills, "local memory": self.usage["LOCAL"], "stack": self.usage["STACK"]}
        return Report(
            arch=arch,
            kernel=name,
            registers=self.usage["REG"],
            spill_bytes=self.spills,
            local_bytes=self.usage["LOCAL"],
            stack_bytes=self.usage["STACK"],
            shared_bytes=self.kernel.metadata.shared,
            counts=dict(counts),
            problems=[*(f"{n} bytes of {what}" for what, n in memory.items() if n), *problems],
            ptx=self.ptx,
            **more,
        )

    def cubin(self, name: str) -> Cubin:
        """What the manifest says of a variant's cubin."""
        metadata = self.kernel.metadata
        return Cubin(
            variant=name,
            target=f"sm_{self.target}",
            file=f"{name}-sm_{self.target}.cubin",
            sha256=hashlib.sha256(self.kernel.asm["cubin"]).hexdigest(),
            kernel=metadata.name,
            parameters=self.parameters,
            shared=metadata.shared,
            num_warps=metadata.num_warps,
            registers=self.usage["REG"],
            ptxas=triton.knobs.nvidia.ptxas.version,
        )


def launch_problems(cubin: Cubin, metadata: Mapping[str, Any], arguments: int, num_warps: int) -> list[str]:
    """What the plain launch of `cubins` could not do: scratch memory, clusters, cooperative grids, other parameters.

    Args:
        cubin: what was compiled.
        metadata: Triton's.
        arguments: how many the kernel has, all of them addresses.
        num_warps: of one program, as it was asked for.
    """
    plain = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False, "launch_pdl": False}
    plain |= {"num_ctas": 1, "num_warps": num_warps}
    problems = [f"{key} is {metadata[key]}, not {value}" for key, value in plain.items() if metadata[key] != value]
    # After the kernel's own arguments Triton passes two addresses of scratch memory.
    expected = tuple((8 * i, 8) for i in range(arguments + 2))
    if cubin.parameters != expected:
        problems.append(f"its parameters are {cubin.parameters}, not {expected}")
    return problems


def compile_kernel(
    kernel: Any,
    arch: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Iterable[bool],
    options: Mapping[str, Any],
) -> Compiled:
    """Compile a Triton kernel for one compute capability, with Triton's own ptxas.

    Of the two that Triton brings, it is the older one, for every architecture: a newer toolkit's cubins need a newer
    driver. No path of this machine gets into the code, as line numbers are left out.

    Args:
        kernel: the jitted function.
        arch: compute capability, 90 for sm_90.
        signature: Triton's type of each argument that is not a constant, in order.
        constants: the others.
        aligned: of each argument of the signature, whether it is a multiple of 16.
        options: Triton's compile options.

    Raises:
        FastlockError: Triton was imported with TRITON_INTERPRET=1, which cannot compile.
    """
    if INTERPRETED:
        raise FastlockError("Triton cannot compile under TRITON_INTERPRET=1: unset it and start Python again.")
    source = ASTSource(
        kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned},
    )
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a kernel from the cache leaves no ptxas log
        triton.knobs.compilation.disable_line_info = True
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.nvidia.ptxas_blackwell = triton.knobs.nvidia.ptxas.path
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    if not spills:
        raise FastlockError(f"ptxas said nothing about spills:\n{log.getvalue()}")
    return Compiled(made, *_read_elf(made.asm["cubin"], made.metadata.name), sum(map(int, spills)))


def compile_all(op: Op[_Job], jobs: Sequence[tuple[int, _Job]], processes: int) -> Iterator[Report]:
    """Each job in turn; over several processes, as ptxas and Triton's passes use one thread each."""
    if processes == 1:
        yield from (op.compile(arch, job) for arch, job in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(op.compile, *zip(*jobs, strict=True), chunksize=4)


def write_cubins(reports: Iterable[Report], directory: Path) -> Manifest:
    """Write what wheels have, and has no problem, to a directory of its own, which is made anew.

    Raises:
        FastlockError: the directory holds something else.
    """
    if directory.exists() and any(path.suffix not in (".cubin", ".json") for path in directory.iterdir()):
        raise FastlockError(f"{directory} holds other files than cubins; name a directory of their own.")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cubins = []
    for report in reports:
        if report.cubin is not None and not report.problems:
            (directory / report.cubin.file).write_bytes(report.binary)
            cubins.append(report.cubin)
    manifest = Manifest(triton.__version__, digest_of_sources(), tuple(cubins))
    (directory / MANIFEST).write_text(manifest.to_json())
    return manifest


def count_wide_loads(ptx: str) -> int:
    """How many 16-byte loads from global memory the code has."""
    return len(re.findall(r"\bld\.global\S*\.v4\.[bf]32\b", ptx))


def count_wide_copies(ptx: str) -> int:
    """How many asynchronous copies of 16 bytes from global to shared memory the code has."""
    return len(re.findall(r"\bcp\.async\.\S+ \[[^]]*\], \[[^]]*\], 0x10\b", ptx))


def programs_at_once(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """How many programs run on a multiprocessor of a compute capability at once.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; registers are given out by warps, in
    portions of 256, and each program takes a KiB of shared memory more than it asks for ("Shared Memory" of 9.0).

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        num_warps: of a program.
    """
    limits = MULTIPROCESSORS[arch]
    of_a_warp = -(-32 * registers // 256) * 256
    return min(
        limits.programs,
        limits.warps // num_warps,
        limits.registers // of_a_warp // num_warps,
        limits.shared // (shared + 1024),
    )


def rounding_problems(ptx: str, dtype: torch.dtype) -> list[str]:
    """Whether 16-bit results of this dtype are rounded otherwise than to the nearest; nothing is said of float32."""
    if dtype == torch.float32:
        return []
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    modes = set(re.findall(rf"\bcvt\.(\S+?)\.{kind}(?:x2)?\.f32\b", ptx))
    return [] if modes == {"rn"} else [f"the result is rounded by {sorted(modes)}, not by cvt.rn alone"]


def processors() -> int:
    """How many processors this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)))


def _read_elf(cubin: bytes, kernel: str) -> tuple[str, dict[str, int], tuple[tuple[int, int], ...]]:
    """Target, usage and parameters of a kernel of this name, as Triton's own cuobjdump reads them in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-elf", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    own = text.partition(f"\n.nv.info.{kernel}\n")[2].partition("\n\n\n")[0]
    ordinals = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", own)
    parameters = sorted(tuple(int(number, 16) for number in numbers) for numbers in ordinals)
    (target,) = set(re.findall(r"\bsm=(\w+),", text))
    return target, usage, tuple((offset, size) for _, offset, size in parameters)
