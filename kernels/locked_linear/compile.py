"""Compile the kernels with a lock per row without a GPU, and check the code: wide copies, tensor cores, rounding.

No wheel has them compiled.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastlock.kernels.ahead_of_time.compile import Op, Report, compile_kernel, count_wide_loads, rounding_problems
from fastlock.kernels.locked_linear.tiles import (
    DECODE_ROWS,
    DTYPES,
    MANY_ROWS_TILES,
    MOST_ROWS,
    Multiprocessors,
    Sizes,
    Tile,
    Way,
    triton_ways,
    ways,
)
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
# How many multiprocessors an A100, an H100 or H200, a B200 and an RTX 5090 have.
COUNTS = {80: 108, 90: 132, 100: 148, 120: 170}
# Of a layer, as in Llama-3 8B; and the sizes of its output projection, and of Llama-3 70B's.
HEADS = 32
HIDDEN = (4096, 8192)
BUCKETS = (16, 32, 64, 512, MOST_ROWS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE_COPIES, TENSOR_CORES = "copies", "mma"

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
        way: one of `tiles.ways`.
        dtype: of x and W.
        head_dim: columns of one head.
        transposed: each column of W is contiguous in memory, not each row.
        has_bias: whether there is a c.
        even: whether the tile divides the width.
        put_back: of the two kernels of "around", the second.
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


def jobs(arch: int) -> Iterator[Compilation]:
    """Every kernel that may be launched on a compute capability, for the head sizes of known models; some twice."""
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


def processors_of(arch: int) -> Multiprocessors:
    """Those of a large GPU of a compute capability."""
    return Multiprocessors(arch // 10, COUNTS[arch], SHARED_BYTES[arch])


def ways_on(arch: int, dtype: torch.dtype, head_dim: int) -> list[Way]:
    """Triton's projections that may be launched on a compute capability, whatever the sizes are."""
    on = processors_of(arch)
    return list(dict.fromkeys(way for rows in BUCKETS for way in triton_ways(dtype, rows, head_dim, on)))


def likely_on(arch: int, dtype: torch.dtype) -> list[Way]:
    """Those of them that are launched for the output projections of Llama-3 8B and 70B."""
    on = processors_of(arch)
    every = [ways(Sizes(dtype, rows, hidden, hidden, 128), on) for rows, hidden in itertools.product(BUCKETS, HIDDEN)]
    return list(dict.fromkeys(way for found in every for way in found if way.tile))


def sample(arch: int) -> Iterator[Compilation]:
    """What CI compiles: every likely tile on sm_90 in bfloat16, three elsewhere; and one of each kind."""
    of_bf16 = likely_on(arch, BF16)
    if arch == 90:
        yield from (Compilation(way, BF16) for way in of_bf16)
        both = [way for way in of_bf16 if way.tile == Tile(16, 32, 128, 4, 8)]
        yield from (Compilation(way, FP16, transposed=True, has_bias=False) for way in both)
        yield Compilation(both[0], BF16, even=False)
        yield from (Compilation(Way("shift", Tile(64, 64, d & -d, 4, 4)), BF16, d) for d in (80, 96))
        yield Compilation(Way("shift", MANY_ROWS_TILES[0]), BF16)  # which is not launched: a test says why
        yield from (Compilation(Way("around"), BF16, put_back=put_back) for put_back in (False, True))
        yield Compilation(Way("add"), BF16)
        yield from (Compilation(way, FP32) for way in ways_on(arch, FP32, 128))
    else:
        tiles = [way.tile for way in of_bf16 if way.tile]
        largest = max(tiles, key=lambda tile: (tile.rows * tile.hidden, tile.width))
        of_decode = next(tile for tile in tiles if tile.rows == DECODE_ROWS)
        yield from (Compilation(way, BF16) for way in of_bf16 if way.tile in (tiles[0], of_decode, largest))


def compile_job(arch: int, job: Compilation) -> Report:
    """Compile one kernel for one compute capability; see `compile_kernel`."""
    kernel, constants = kernel_of(job)
    signature = {name: type_of(name, job.dtype) for name in kernel.arg_names if name not in constants}
    aligned = [name.startswith("p_") or name in MULTIPLES for name in signature]
    options = job.way.tile.options() if job.way.tile else {"enable_fp_fusion": True}
    compiled = compile_kernel(kernel, arch, signature, constants, aligned, options)
    ptx, shared = compiled.ptx, compiled.kernel.metadata.shared
    problems = code_problems(job, ptx)
    if shared > SHARED_BYTES[arch] or (job.way.tile and shared > job.way.tile.shared_bytes(job.dtype)):
        problems.append(f"{shared} bytes of shared memory, more than the device has or the tile says")
    counts = {WIDE_COPIES: count_wide_copies(ptx), TENSOR_CORES: count_tensor_cores(ptx)}
    return compiled.report(arch, job.name, counts, problems)


def kernel_of(job: Compilation) -> tuple[Any, dict[str, Any]]:
    """The kernel of a job, and its constexpr arguments."""
    tile = job.way.tile
    if job.way.kind == "add":
        return add_kernel, {"BM": ADD_ROWS, "BN": ADD_COLUMNS}
    if tile is None:
        return shift_kernel, shift_constants(job.head_dim, HEADS, job.put_back)
    width = tile.width * 16 + (0 if job.even else 8)
    return gemm_kernel, gemm_constants(tile, job.way.kind, width, job.head_dim, job.has_bias, job.transposed)


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
    elif not count_wide_loads(ptx):
        problems.append("no 16-byte load")
    if narrow := re.findall(rf"\bst\.global\.b{8 * job.dtype.itemsize}\b", ptx):
        problems.append(f"{len(narrow)} stores of one number")
    return problems if job.put_back else problems + rounding_problems(ptx, job.dtype)


OP = Op(
    name="locked_linear",
    sample=sample,
    every=jobs,
    shipped=lambda arch: (),
    compile=compile_job,
    counted=(WIDE_COPIES, TENSOR_CORES),
)
