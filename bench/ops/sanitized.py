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
from fastlock.kernels.proximal_step import launch as step
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors, proximal_step
from fastlock.kernels.proximal_step.self_check import widened
from fastlock.kernels.proximal_step.variants import StepVariant, step_variants

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


def wrong_steps(every: bool) -> list[str]:
    """The optimizer's kernels that are wrong, on tensors of which none ends where a block does; every one, or one."""
    wrong = []
    for variant in step_variants() if every else [StepVariant(torch.float32, torch.float32, torch.float32)]:
        settings = StepSettings(0.5, 0.5, 0.5, 1e-3, 0.25, pull=0.75, seed=7 if variant.stochastic else None)
        tensors = [of_step(variant, settings, length) for length in (variant.block + 5, 63, 1)]
        expected = [widened(one) for one in tensors]
        table = step.StepTable(variant, tensors[0].weight.device)
        table.update(tensors, step.StepScalars())
        table.sum_of_squares()
        table.step()
        machine.synchronize(DEVICE)
        for one, truth in zip(tensors, expected, strict=True):
            proximal_step(truth)
            error = 2 * torch.finfo(one.weight.dtype).eps * truth.weight.abs() + 1e-5
            if not ((one.weight.cpu().float() - truth.weight).abs() <= error).all():
                wrong.append(variant.name)
    return wrong


def of_step(variant: StepVariant, settings: StepSettings, length: int) -> StepTensors:
    def numbers(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(length, device=DEVICE).to(dtype)

    return StepTensors(
        weight=numbers(variant.weight),
        grad=numbers(variant.weight),
        exp_avg=numbers(variant.state),
        exp_avg_sq=numbers(variant.state).abs(),
        anchor=numbers(variant.anchor) if variant.anchor else None,
        settings=settings,
        step=3.0,
    )


def main() -> int:
    worst, wrong = worst_of_rows(), []
    for switch in ("1", "0"):  # by a cubin, where there is one, and by Triton's JIT
        os.environ[cubins.SWITCH] = switch
        cubins.LOADER.forget()
        if DEVICE.type == "cuda":
            wrong += wrong_steps(every=sized(switch == "1", tiny=False))  # Triton takes a while for each
        for dtype, head_dim, transposed in itertools.product(variants.DTYPES, HEAD_DIMS, (False, True)):
            for heights in (HIDDEN, ALIGNED_HIDDEN) if transposed else (HIDDEN,):
                # Triton takes a while for each kind: one head size of them.
                every = switch == "0" and head_dim == HEAD_DIMS[-1]
                worst = max(worst, worst_of_fold(dtype, head_dim, transposed, heights, every))
    print(f"largest error, in units of reference.error_bound: {worst:.2f}; wrong steps: {', '.join(wrong) or 'none'}")
    return 0 if worst <= 1 and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
