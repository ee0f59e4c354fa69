"""Compile a kernel without a GPU, and read what came out of it: registers, spills, parameters."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlock.errors import FastlockError

ARCHS = (80, 90, 100, 120)
# True where TRITON_INTERPRET=1 was set when this module was imported: Triton can't compile then.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_Wanted = TypeVar("_Wanted")

_Found = TypeVar("_Found")


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
