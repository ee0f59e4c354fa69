"""Every kernel on the device, for `compute-sanitizer` to watch, run by sanitizer.py; exit code 1 if one is wrong.

Weights lie at the very end of their allocations, so that reading past one is reading past an allocation.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence

from fastlock.kernels.fold import variants
from fastlock.kernels.locked_linear import tiles

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that each tensor is an allocation of its own

import torch

from bench.lib import machine
from bench.lib.tiny import sized
from bench.lib.workloads import errors
from bench.ops import rows
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.locked_linear import launch as locked_linear

DEVICE = machine.device()
HEADS = (0, 2)
HEAD_DIMS = sized((64, 80), (64,))
# By columns, only weights whose columns are whole vectors are aligned.
HIDDEN, ALIGNED_HIDDEN = sized(((1000, 33, 1), (1000, 40, 8)), ((40, 33, 1), (40, 8)))


def site(dtype: torch.dtype, head_dim: int, transposed: bool, hidden: int) -> tuple[HeadColumns, torch.Tensor]:
    lines, length = (3 * head_dim, hidden) if transposed else (hidden, 3 * head_dim)
    weight = torch.randn(lines, length, device=DEVICE).to(dtype)
    values = torch.randn(len(HEADS), head_dim, dtype=torch.float64)
    return HeadColumns.in_projection(weight.t() if transposed else weight, HEADS, head_dim), values


def worst_of_rows() -> float:
    """The largest error of the projections with a lock per row, by a way of each kind; no tile divides the rows."""
    worst = 0.0
    width = sized(640, 96)
    for count in sized((1, 136), (1,)):
        case = rows.make_case(torch.randn(1, width, width, device=DEVICE).to(rows.DTYPE), count)
        (inputs,) = case.inputs
        ways = locked_linear.ways_for(inputs) if rows.ON_GPU else [tiles.BY_TORCH]
        for way in {way.kind: way for way in ways}.values():
            y = locked_linear.run(way, inputs)
            machine.synchronize(DEVICE)
            worst = max(worst, rows.error_in_bounds(inputs, case.d, y))
    return worst


def worst_of_fold(dtype: torch.dtype, head_dim: int, transposed: bool, heights: Sequence[int], every: bool) -> float:
    """The largest error of some sites in one launch, by the default kind of kernel, or by every one that can."""
    sites = [site(dtype, head_dim, transposed, hidden) for hidden in heights]
    columns, values = zip(*sites, strict=True)
    biases = [torch.randn(len(of_site.matrix)).to(of_site.matrix) for of_site in columns]
    outs = [torch.full_like(bias, torch.nan) for bias in biases]
    default = fold.build_table(columns, values, biases, outs).variant
    worst = 0.0
    for kind in variants.KINDS if every else [default.kind]:
        if dataclasses.replace(default, kind=kind).misfit:
            continue
        for out in outs:
            out.fill_(torch.nan)
        fold.launch(fold.build_table(columns, values, biases, outs, kind))
        machine.synchronize(DEVICE)
        worst = max(worst, errors(columns, values, outs, biases)["bounds"])
    return worst


def main() -> int:
    worst = worst_of_rows()
    for switch in ("1", "0"):  # by a cubin, where there is one, and by Triton's JIT
        os.environ[cubins.SWITCH] = switch
        cubins.LOADER.forget()
        for dtype, head_dim, transposed in itertools.product(variants.DTYPES, HEAD_DIMS, (False, True)):
            for heights in (HIDDEN, ALIGNED_HIDDEN) if transposed else (HIDDEN,):
                # Triton takes a while for each kind: one head size of them.
                every = switch == "0" and head_dim == HEAD_DIMS[-1]
                worst = max(worst, worst_of_fold(dtype, head_dim, transposed, heights, every))
    print(f"largest error, in units of reference.error_bound: {worst:.2f}")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
