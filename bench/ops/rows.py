"""The projection with a lock per row, by every way, against the plain projection of the same run.

On a GPU each way is one CUDA graph over all weights, so that the host's pace is not in the times and the L2 cache is
cold; the ways take turns. What it computed is held against float64. On a CPU: what runs there, on small shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from bench.lib import machine
from bench.lib.figures import interval_of_median
from bench.lib.tiny import sized
from fastlock.kernels.locked_linear import launch as locked_linear
from fastlock.kernels.locked_linear import timing
from fastlock.kernels.locked_linear.reference import Inputs
from fastlock.kernels.locked_linear.tiles import BY_TORCH
from fastlock.models.locked_linear_op import locked_linear as op

ON_GPU = machine.device().type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# Width and height of the output projections of Llama-3 8B and 70B.
SIZES = sized({"8B": 4096, "70B": 8192} if ON_GPU else {"small": 512}, tiny={"tiny": 64})
ROWS = sized((1, 4, 16, 64, 4096, 8192) if ON_GPU else (1, 16, 64), tiny=(1,))
HEAD_DIM = sized(128, 32)
LOCKS, HEADS_A_LOCK = 8, 2
REQUESTS = 8  # of a prompt's rows; up to DECODE rows each row is a request
DECODE = 64
ROUNDS = sized(20, 2)
# The weights of one round are this many times the cache.
COLD = 4
CHECKED_ROWS = 32

Compute = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One shape: the inputs with each of the weights; and the displacements as a hook would have them.

    Attributes:
        d: [LOCKS + 1, width] of x's dtype at strength 1, the last one zero.
    """

    inputs: list[Inputs]
    d: torch.Tensor


@pytest.fixture(scope="module")
def weights_of() -> Callable[[int], torch.Tensor]:
    """Makes the random weights of a size, [count, size, size], or gives those made last."""
    held: dict[int, torch.Tensor] = {}

    def make(size: int) -> torch.Tensor:
        if size not in held:
            held.clear()
            count = max(2, math.ceil(COLD * machine.cache_bytes() / (size * size * DTYPE.itemsize))) if ON_GPU else 2
            shape = (count, size, size)
            held[size] = torch.randn(shape, device=machine.device(), dtype=torch.float32).mul_(0.02).to(DTYPE)
        return held[size]

    return make


@pytest.fixture(scope="module")
def copy() -> float:
    """Bytes a second of a large copy on the device, read plus written."""
    bandwidth = machine.copy_bandwidth(machine.device())
    if ON_GPU:
        torch.cuda.empty_cache()
    return bandwidth


@pytest.mark.parametrize(("size", "rows"), list(itertools.product(SIZES, ROWS)))
def test_rows(
    size: str,
    rows: int,
    weights_of: Callable[[int], torch.Tensor],
    copy: float,
    record_property: Callable[..., None],
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        case = make_case(weights_of(SIZES[size]), rows)
        ways, names = ways_of(case)
        results = {name: way(case.inputs[0]) for name, way in ways.items()}
        error = {
            name: error_in_bounds(case.inputs[0], case.d, y) for name, y in results.items() if "linear" not in name
        }
        times = take_turns(ways, case.inputs)
    measured: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        ratios = [mine / plain for mine, plain in zip(seconds, times["linear"], strict=True)]
        measured[name] = {"tile": names.get(name, ""), "seconds": interval_of_median(seconds)}
        measured[name] |= {"ratio": interval_of_median(ratios), "error_in_bounds": error.get(name)}
    row: dict[str, Any] = {
        "size": size,
        "rows": rows,
        "dtype": str(DTYPE).removeprefix("torch."),
        "device": str(machine.device()),
    }
    row |= {"hidden": SIZES[size], "weights": len(case.inputs), "rounds": ROUNDS, "decode": rows <= DECODE}
    row |= {"bytes": bytes_of(case.inputs[0]), "copy_bytes_per_second": copy, "ways": measured}
    record_property("row", row)
    assert all(bounds <= 1 for name, bounds in error.items() if name != "hook")


def make_case(weights: torch.Tensor, rows: int) -> Case:
    """Three quarters of the requests have a lock, one after the other of LOCKS; each shifts HEADS_A_LOCK heads."""
    device, width = weights.device, weights.shape[2]
    num_heads = width // HEAD_DIM
    of_lock = torch.arange(LOCKS * HEADS_A_LOCK).view(LOCKS, HEADS_A_LOCK) % num_heads
    columns = sorted(set(of_lock.flatten().tolist()))
    heads = torch.full((num_heads,), -1, dtype=torch.int32)
    heads[columns] = torch.arange(len(columns), dtype=torch.int32)
    slots = torch.full((LOCKS, len(columns)), -1, dtype=torch.int32)
    values = torch.randn(LOCKS * HEADS_A_LOCK, HEAD_DIM) / HEAD_DIM**0.5
    d = torch.zeros(LOCKS + 1, num_heads, HEAD_DIM)
    for slot, head in enumerate(of_lock.flatten().tolist()):
        slots[slot // HEADS_A_LOCK, heads[head]] = slot
        d[slot // HEADS_A_LOCK, head] = values[slot]
    d = d.flatten(1).to(device)
    requests = rows if rows <= DECODE else REQUESTS
    lock = torch.tensor([-1 if i % 4 == 3 else i % LOCKS for i in range(requests)], dtype=torch.int32, device=device)
    strength = torch.full((requests,), 6.0, device=device)
    x = torch.randn(rows, width, device=device).to(DTYPE)
    heads, slots, values = (table.to(device) for table in (heads, slots, values))
    folds = [(d[:LOCKS].double() @ weight.double().t()).float() for weight in weights]
    inputs = [
        Inputs(x, weight, None, heads, slots, values, fold, lock, strength)
        for weight, fold in zip(weights, folds, strict=True)
    ]
    return Case(inputs, d.to(DTYPE))


def bytes_of(inputs: Inputs) -> int:
    """What any way must read and write, once each: W, x and y. The tables of the locks are not counted."""
    return inputs.x.itemsize * (inputs.weight.numel() + inputs.rows * sum(inputs.weight.shape))


def ways_of(case: Case) -> tuple[dict[str, Compute], dict[str, str]]:
    """Every way by name, and the names of the tiles that are the fastest of Triton's projections."""
    first = case.inputs[0]
    bias = first.folds[0].to(DTYPE)
    computes: dict[str, Compute] = {
        "linear": lambda inputs: functional.linear(inputs.x, inputs.weight),
        "linear and bias": lambda inputs: functional.linear(inputs.x, inputs.weight, bias),
        "hook": lambda inputs: by_hook(inputs, case.d),
    }
    names = {}
    times = locked_linear.seconds(locked_linear.ways_for(first), case.inputs) if ON_GPU else {BY_TORCH: 0.0}
    for kind in dict.fromkeys(way.kind for way in times):
        way = timing.fastest({way: seconds for way, seconds in times.items() if way.kind == kind})
        names[kind] = way.tile.name if way.tile else ""
        computes[kind] = partial(locked_linear.run, way)
    computes["chosen"] = by_op
    by_op(first)
    if (chosen := locked_linear.CHOICES.of(first)) is not None:
        names["chosen"] = chosen.name
    return computes, names


def by_op(inputs: Inputs) -> torch.Tensor:
    """As LockedLinear computes it."""
    arguments = (getattr(inputs, field.name) for field in dataclasses.fields(inputs))
    y: torch.Tensor = op(*arguments)
    return y


def by_hook(inputs: Inputs, d: torch.Tensor) -> torch.Tensor:
    """What a forward pre-hook with a lock per request would do: gather d, add it to x, then the projection."""
    shift = d[inputs.lock_of_row] * inputs.strength_of_row[:, None].to(d.dtype)  # -1 is the last one, zero
    x = inputs.x.view(len(shift), -1, inputs.x.shape[1]) + shift[:, None]
    return functional.linear(x.view(inputs.x.shape), inputs.weight)


def error_in_bounds(inputs: Inputs, d: torch.Tensor, y: torch.Tensor) -> float:
    """The largest error against float64, in units of the bound that every way must keep, over some rows.

    It is that of rounding x + s d to x's dtype, of a float32 sum of width + 6 terms, and of rounding y twice.
    """
    rows = torch.linspace(0, inputs.rows - 1, min(CHECKED_ROWS, inputs.rows)).long().to(y.device)
    info, n = torch.finfo(DTYPE), inputs.weight.shape[1] + 6
    slot = inputs.slots[inputs.lock_of_row.clamp(min=0)][:, inputs.heads.clamp(min=0)]
    shifted = (inputs.lock_of_row >= 0)[:, None] & (inputs.heads >= 0) & (slot >= 0)
    exact_d = torch.where(shifted[..., None], inputs.values[slot.clamp(min=0)].double(), 0.0).flatten(1)
    shift = (exact_d * inputs.strength_of_row.double()[:, None]).repeat_interleave(inputs.rows_per_entry, 0)[rows]
    x, weight = inputs.x[rows].double(), inputs.weight.double()
    truth = (x + shift) @ weight.t()
    size = (x.abs() + shift.abs()) @ weight.abs().t()
    bound = (info.eps / 2 + n * 2.0**-24) * size
    bound += info.eps / 2 * ((x @ weight.t()).abs() + truth.abs() + 2 * bound)
    return float(((y[rows].double() - truth).abs() / bound).nan_to_num(nan=math.inf).max())


def take_turns(ways: dict[str, Compute], inputs: list[Inputs]) -> dict[str, list[float]]:
    """Seconds of each way, ROUNDS times: all weights in a row, divided by how many they are."""
    runs = {name: graph_of(way, inputs) if ON_GPU else plainly(way, inputs) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(run() / len(inputs))
    return times


def plainly(way: Compute, inputs: list[Inputs]) -> Callable[[], float]:
    """Runs a way with each of the inputs, and says how long that took."""

    def run() -> float:
        start = time.perf_counter()
        for one in inputs:
            way(one)
        return time.perf_counter() - start

    run()
    return run


def graph_of(way: Compute, inputs: list[Inputs]) -> Callable[[], float]:
    """The same as one CUDA graph, timed between two events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs:  # whatever is compiled or chosen once
            way(one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in inputs:
            way(one)

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    run()
    return run
