"""Compile the kernels with a lock per row ahead of time, without a GPU, and check the code. None is shipped compiled.

Run as `python -m fastlock.kernels.locked_linear.compile`; `python -m fastlock.kernels.build` does it too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from fastlock.kernels.ahead_of_time import compile
from fastlock.kernels.ahead_of_time.compile import ARCHS
from fastlock.kernels.locked_linear.tiles import DTYPES, MOST_ROWS, Tile, Way, shift_tiles, tiles
from fastlock.kernels.locked_linear.triton_kernels import (
    ADD_COLUMNS,
    ADD_ROWS,
    add_kernel,
    gemm_constants,
    gemm_kernel,
    shift_constants,
    shift_kernel,
)

# Shared memory that one program may have, bytes: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
BUCKETS = (16, 32, 64, 512, MOST_ROWS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_OF_DTYPE = ("p_x", "p_w", "p_bias", "p_y", "p_held")
_TABLES = {"p_heads": "*i32", "p_slots": "*i32", "p_values": "*fp32", "p_folds": "*fp32"}
_TABLES |= {"p_lock": "*i32", "p_strength": "*fp32"}
# Multiples of 16 in every known model; the strides are elements.
MULTIPLES = ("hidden", "width", "stride_x", "stride_w")


@dataclass(frozen=True)
class Compilation:
    """One kernel to compile.

    Attributes:
        way: a way of `locked_linear.ways`; of "around" there are two kernels, of which `put_back` tells which.
        dtype: of x and W.
        head_dim: columns of one head.
        transposed: the columns of W lie next to one another.
        has_bias: whether there is a c.
        even: whether the tile divides the width.
    """

    way: Way
    dtype: torch.dtype
    head_dim: int = 128
    transposed: bool = False
    has_bias: bool = True
    even: bool = True
    put_back: bool = False

    @property
    def name(self) -> str:
        """Such as bfloat16-gather-128x256x64-8-4-columns."""
        parts = [str(self.dtype).removeprefix("torch."), self.way.name]
        parts += [f"head{self.head_dim}"] if self.head_dim != 128 else []
        parts += ["columns"] if self.transposed else []
        parts += [] if self.has_bias else ["no_bias"]
        parts += [] if self.even else ["uneven"]
        parts += ["back"] if self.put_back else []
        return "-".join(parts)


@dataclass(frozen=True)
class LockedLinearReport:
    """What came out of one compilation.

    Attributes:
        arch: compute capability, 90 for sm_90.
        job: the name of the job.
        registers: registers of one thread.
        spill_bytes, local_bytes, stack_bytes: memory of one thread that should be registers.
        shared_bytes: shared memory of one program.
        wide_copies: 16-byte copies from global to shared memory in the code.
        tensor_cores: instructions for them.
        problems: what is wrong with it, in words.
        ptx: the code.
    """

    arch: int
    job: str
    registers: int
    spill_bytes: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    wide_copies: int
    tensor_cores: int
    problems: list[str]
    ptx: str = field(repr=False)


def jobs(arch: int) -> Iterator[Compilation]:
    """Every kernel that production may launch on an architecture for the head sizes of known models; some twice."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for way in ways_on(arch, dtype, head_dim):
                # Only what adds d to x as it is read knows of heads.
                if way.kind == "shift" or head_dim == 128:
                    for transposed, has_bias in itertools.product((False, True), repeat=2):
                        yield Compilation(way, dtype, head_dim, transposed, has_bias)
                    if way.kind == "gather":
                        yield Compilation(way, dtype, head_dim, even=False)
            yield from (Compilation(Way("around"), dtype, head_dim, put_back=put_back) for put_back in (False, True))
        yield Compilation(Way("add"), dtype)


def ways_on(arch: int, dtype: torch.dtype, head_dim: int) -> list[Way]:
    """Triton's projections that may be launched on an architecture, for whatever number of rows."""
    found = list(dict.fromkeys(t for rows in BUCKETS for t in tiles(dtype, rows, arch // 10, SHARED_BYTES[arch])))
    ways = [Way("gather", tile) for tile in found]
    return ways + [Way("shift", tile) for tile in shift_tiles(found, head_dim, dtype)]


def sample(arch: int) -> Iterator[Compilation]:
    """What CI compiles: every tile on sm_90 in bfloat16, the first and the largest elsewhere; and one of each kind."""
    of_bf16 = ways_on(arch, BF16, 128)
    if arch == 90:
        yield from (Compilation(way, BF16) for way in of_bf16)
        ways = [way for way in of_bf16 if way.tile == Tile(16, 32, 128, 4, 5)]
        yield from (Compilation(way, FP16, transposed=True, has_bias=False) for way in ways)
        yield Compilation(ways[0], BF16, even=False)
        yield from (Compilation(Way("shift", Tile(64, 64, d & -d, 4, 4)), BF16, d) for d in (80, 96))
        yield from (Compilation(Way("around"), BF16, put_back=put_back) for put_back in (False, True))
        yield Compilation(Way("add"), BF16)
        yield from (Compilation(way, FP32) for way in ways_on(arch, FP32, 128))
    else:
        largest = max((way.tile for way in of_bf16 if way.tile), key=lambda tile: (tile.rows * tile.hidden, tile.width))
        yield from (Compilation(way, BF16) for way in of_bf16 if way.tile in (of_bf16[0].tile, largest))


def compile_job(arch: int, job: Compilation) -> LockedLinearReport:
    """Compile one kernel for one compute capability: see `build.compiled`."""
    kernel, constants = kernel_of(job)
    signature = {name: type_of(name, job.dtype) for name in kernel.arg_names if name not in constants}
    aligned = [name.startswith("p_") or name in MULTIPLES for name in signature]
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned},
    )
    options = job.way.tile.options() if job.way.tile else {"enable_fp_fusion": True}
    found = compile.compiled(source, arch, options)
    ptx, memory = found.kernel.asm["ptx"], found.memory
    shared = found.kernel.metadata.shared
    problems = [f"{n} bytes of {what}" for what, n in memory.items() if n] + code_problems(job, ptx)
    if shared > SHARED_BYTES[arch] or (job.way.tile and shared > job.way.tile.shared_bytes(job.dtype)):
        problems.append(f"{shared} bytes of shared memory, more than the device has or the tile says")
    return LockedLinearReport(
        arch=arch,
        job=job.name,
        registers=found.elf.usage["REG"],
        spill_bytes=memory["spills"],
        local_bytes=memory["local memory"],
        stack_bytes=memory["stack"],
        shared_bytes=shared,
        wide_copies=count_wide_copies(ptx),
        tensor_cores=count_tensor_cores(ptx),
        problems=problems,
        ptx=ptx,
    )


def kernel_of(job: Compilation) -> tuple[Any, dict[str, Any]]:
    """The kernel of a job and its constexpr arguments."""
    if job.way.kind == "add":
        return add_kernel, {"BM": ADD_ROWS, "BN": ADD_COLUMNS}
    if job.way.tile is None:
        return shift_kernel, shift_constants(job.head_dim, job.put_back)
    width = job.way.tile.width * 16 + (0 if job.even else 8)
    return gemm_kernel, gemm_constants(job.way, job.dtype, width, job.head_dim, job.has_bias, job.transposed)


def type_of(name: str, dtype: torch.dtype) -> str:
    """Triton's type of an argument that is not a constant."""
    return _POINTERS[dtype] if name in _OF_DTYPE else _TABLES.get(name, "i32")


def count_wide_copies(ptx: str) -> int:
    """How many 16-byte copies from global to shared memory the code has."""
    return len(re.findall(r"\bcp\.async\.cg\.shared\.global[^;]*, 0x10\b", ptx))


def count_tensor_cores(ptx: str) -> int:
    """How many instructions for the tensor cores the code has."""
    return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))


def expected_wide_copies(tile: Tile, dtype: torch.dtype) -> int:
    """The 16-byte copies of one thread and step if all of x and W is read by them."""
    threads, vector = 32 * tile.num_warps, 16 // dtype.itemsize
    return sum(max(1, lines * tile.width // vector // threads) for lines in (tile.rows, tile.hidden))


def code_problems(job: Compilation, ptx: str) -> list[str]:
    """What is wrong with the code: narrow reads of x, W or y, no tensor cores (or some for float32), or rounding."""
    problems = []
    if job.way.tile is not None:
        # The steps before the loop copy as much as one in it does.
        expected = expected_wide_copies(job.way.tile, job.dtype) * (job.way.tile.num_stages - 1)
        if (found := count_wide_copies(ptx)) < expected:
            problems.append(f"{found} 16-byte copies, {expected} expected")
        if (count_tensor_cores(ptx) > 0) != (job.dtype != FP32):
            problems.append(f"{count_tensor_cores(ptx)} instructions for tensor cores")
    elif not re.search(r"\bld\.global\S*\.v4\.[bf]32\b", ptx):
        problems.append("no 16-byte load")
    if narrow := re.findall(rf"\bst\.global\.b{8 * job.dtype.itemsize}\b", ptx):
        problems.append(f"{len(narrow)} stores of one number")
    if job.dtype != FP32 and not job.put_back:
        kind = "bf16" if job.dtype == BF16 else "f16"
        modes = set(re.findall(rf"\bcvt\.(\S+?)\.{kind}(?:x2)?\.f32\b", ptx))
        if modes != {"rn"}:
            problems.append(f"the result is rounded by {sorted(modes)}, not by cvt.rn alone")
    return problems


def compile_all(archs: Sequence[int], every: bool, processes: int) -> Iterator[LockedLinearReport]:
    """Each kernel in turn, with a line of a table printed for it."""
    wanted = [(arch, job) for arch in archs for job in dict.fromkeys(jobs(arch) if every else sample(arch))]
    print(f"{'arch':<7}{'kernel':<46}{'regs':>5}{'spills':>8}{'local':>7}{'shared':>8}{'copies':>8}{'mma':>5}")
    for report in compile.in_processes(compile_job, wanted, processes):
        print(
            f"sm_{report.arch:<4}{report.job:<46}{report.registers:>5}{report.spill_bytes:>8}{report.local_bytes:>7}"
            f"{report.shared_bytes:>8}{report.wide_copies:>8}{report.tensor_cores:>5}  {'; '.join(report.problems)}",
            flush=True,
        )
        yield report


def conclude(reports: Sequence[LockedLinearReport]) -> int:
    """Print how many kernels there are, and return how many of them have a problem."""
    bad = sum(bool(report.problems) for report in reports)
    print(f"Triton {triton.__version__}: {len(reports)} kernels, {bad} with problems")
    return bad


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table, and return 1 if any kernel has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fastlock.kernels.locked_linear.compile", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--all", action="store_true", help="every kernel, not only CI's sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports, PTX included, to this file")
    parser.add_argument("--jobs", type=int, default=compile.processors(), help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    reports = list(compile_all(options.arch, options.all, options.jobs))
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if conclude(reports) else 0


if __name__ == "__main__":
    sys.exit(main())
