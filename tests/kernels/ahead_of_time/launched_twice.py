"""One table, launched by Triton's own launcher and by fastlock's, on the driver of libcuda.c in tests/helpers/fake_gpu.

Prints what each launch was given, as JSON, and what fastlock's costs the host. Run by test_triton_launcher.py, in a
process without Triton's interpreter, with that driver as libcuda.so.1.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.compile import write_cubins
from fastlock.kernels.ahead_of_time.ways import WAYS
from fastlock.kernels.fold import compile as build
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import triton_kernel as jit
from fastlock.kernels.fold import variants
from fastlock.kernels.fold.reference import HeadColumns

STREAM = 0x51EA0
LAUNCHES = 1000
FIELDS = ["function", *["grid"] * 3, *["block"] * 3, "shared", "stream", *["parameters"] * 6, "attributes", "launches"]


class OnRecordingDriver:
    """What Triton's JIT asks of a driver; the launcher and the loading of binaries are Triton's own."""

    launcher_cls = CudaLauncher

    def __init__(self) -> None:
        self.utils = CudaUtils()

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def recorded() -> dict[str, Any]:
    numbers = (ctypes.c_uint64 * len(FIELDS))()
    ctypes.CDLL("libcuda.so.1").recorded(numbers)
    found: dict[str, Any] = {}
    for field in dict.fromkeys(FIELDS):
        values = [number for name, number in zip(FIELDS, numbers, strict=True) if name == field]
        found[field] = values if len(values) > 1 else values[0]
    return found


def table() -> tuple[fold.Table, list[torch.Tensor]]:
    """Two sites of different heights, bfloat16, by rows of 128 columns."""
    weights = [torch.randn(4096, 512).bfloat16(), torch.randn(1000, 256).bfloat16()]
    outs = [weight.new_empty(len(weight)) for weight in weights]
    columns = [
        HeadColumns.in_projection(weight, heads, 128) for weight, heads in zip(weights, [(0, 3), (1,)], strict=True)
    ]
    values = [torch.randn(2, 128), torch.randn(1, 128)]
    return fold.build_table(columns, values, [None, None], outs), [*weights, *outs]


def launches_again(made: fold.Table) -> dict[str, float]:
    """What LAUNCHES of one table cost the host, the driver's own work apart: of the driver, in memory, in time."""
    before, blocks = recorded()["launches"], sys.getallocatedblocks()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        fold.launch(made)
    seconds = time.perf_counter() - start
    kept = sys.getallocatedblocks() - blocks
    return {"launches": recorded()["launches"] - before, "kept": kept, "microseconds": seconds / LAUNCHES * 1e6}


def main(folder: Path) -> None:
    variant = variants.default_variant(torch.bfloat16, torch.bfloat16, 128, transposed=False, aligned=True)
    write_cubins([build.compile_variant(90, variant)], folder)
    cubins.LOADER.folder = folder
    cubins.current_stream = lambda index: STREAM
    WAYS.is_good = lambda kernel, index, way: True  # this driver only records
    fold.cuda_index = lambda device: 0
    made, _alive = table()
    fold.launch(made)
    ours = recorded()
    triton.runtime.driver.set_active(OnRecordingDriver())
    jit.launch((made.sites, made.heads, made.values, made.flags), made.variant, made.grid)
    theirs = recorded()
    print(json.dumps({"ours": ours, "theirs": theirs, "again": launches_again(made)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
