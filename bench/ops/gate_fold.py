"""Gates written into the output projections of resident models: by our kernel, by the plan, by a plain torch script.

Random models and gates of the shape of Llama-3 8B. What is read lies in a buffer of its own, as after a first relock,
and W is written. After the timed rounds some rows, filled with NaN before, are held against float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch

from bench.lib import machine
from bench.lib.figures import interval_of_median
from bench.lib.tiny import sized
from bench.lib.ways import seconds_of
from bench.lib.workloads import COLD, MOST_MODELS, SHAPES, STRENGTH, lock_for
from fastlock.gate_fold import GateFold, GateFoldPlan
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold.launch import GateTable, build_table, launch
from fastlock.kernels.gate_fold.reference import GateSite, exact_rewritten, gate_error_bound, locked_columns

DTYPE = torch.bfloat16
ON_GPU = machine.device().type == "cuda"
ROUNDS = sized(20 if ON_GPU else 5, tiny=1)
# The GPU waits this many cycles, some 5 ms, while the host queues.
WAIT = sized(10**7, tiny=1000)
# The most bytes of locked columns that lie ready, and the rows of a site that are held against float64.
MOST_BYTES, CHECKED_ROWS = (16 * 10**9 if ON_GPU else 5 * 10**7), 16
# Which heads have a gate, and its rank: those of the lock whose shape it is, or all of the upper half of the layers.
CASES = [("locked heads", 1), ("all heads", 1), ("all heads", 4)]


@dataclass(frozen=True, eq=False)
class Gated:
    """One layer of one model: W, its locked columns as they were, and the gate."""

    weight: torch.Tensor
    kept: torch.Tensor
    starts: tuple[int, ...]
    readers: torch.Tensor
    writers: torch.Tensor

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return self.readers.shape[2]

    @cached_property
    def site(self) -> GateSite:
        """For the kernel and the reference."""
        return GateSite(
            HeadColumns.side_by_side(self.kept, self.head_dim),
            self.readers,
            self.writers,
            HeadColumns(self.weight, self.starts),
        )

    @property
    def fold(self) -> GateFold:
        """For the plan."""
        site = self.site
        return GateFold(site.columns, site.readers, site.writers, "a layer", target=site.target)


@dataclass(frozen=True, eq=False)
class Resident:
    """Models in memory, together several times the cache, each a list of its layers."""

    models: list[list[Gated]]

    @property
    def bytes_of_one(self) -> int:
        """Bytes that a fold of one model must move: its locked columns, read and written."""
        return 2 * sum(layer.kept.numel() * layer.kept.itemsize for layer in self.models[0])


@pytest.fixture(scope="module")
def copy() -> float:
    """Bytes a second of a large copy, measured before all else."""
    return machine.copy_bandwidth(machine.device())


@pytest.mark.parametrize(("heads", "rank"), CASES)
def test_gates(heads: str, rank: int, copy: float, record_property: Callable[..., None]) -> None:
    device = machine.device()
    resident = make(heads, rank, device)
    plans = [GateFoldPlan([layer.fold for layer in layers]) for layers in resident.models]
    scripts = [[prepared(layer) for layer in layers] for layers in resident.models]
    ways: dict[str, Callable[[], object]] = {"plan": partial(each, [plan.run for plan in plans])}
    ways["torch"] = partial(each, [step for of_model in scripts for step in of_model])
    row: dict[str, Any] = {"launched_by": None, "variant": None}
    if ON_GPU:
        tables, seconds = tables_of(resident)
        ways = {"launch": partial(each, [partial(launch, table) for table in tables]), **ways}
        by = "cubin" if isinstance(tables[0].run, cubins.Launch) else "jit"
        row = {"launched_by": by, "variant": tables[0].variant.name, "table_seconds": seconds}
    measured: dict[str, dict[str, Any]] = {}
    for name, run in ways.items():
        for layer in resident.models[-1]:
            spoil(layer)
        run()
        machine.synchronize(device)
        error = error_in_bounds(resident)
        of_all = seconds_of(run, ROUNDS, WAIT if ON_GPU and name != "plan" else None)
        seconds_of_one = [seconds / len(resident.models) for seconds in of_all]
        measured[name] = {"seconds": interval_of_median(seconds_of_one), "error_in_bounds": error}
    layers = resident.models[0]
    row |= {"heads": heads, "rank": rank, "layers": len(layers), "columns": sum(la.kept.shape[1] for la in layers)}
    row |= {"models": len(resident.models), "bytes": resident.bytes_of_one, "device": str(device), "ways": measured}
    row |= {"dtype": str(DTYPE).removeprefix("torch."), "copy_bytes_per_second": copy, "rounds": ROUNDS}
    record_property("row", row)
    assert all(measured[name]["error_in_bounds"] <= 1 for name in ("launch", "plan") if name in measured)


def make(heads: str, rank: int, device: torch.device) -> Resident:
    """Random models and one random gate; so many that they are cold when they are read again, if memory allows."""
    torch.manual_seed(0)
    shape = SHAPES["8B"]
    displacements = lock_for(shape)[0].displacement(STRENGTH)
    of_lock = {layer: displacement.heads for layer, displacement in displacements.items()}
    of_all = {layer: tuple(range(shape.num_heads)) for layer in range(shape.num_layers // 2, shape.num_layers)}
    locked = of_lock if heads == "locked heads" else of_all
    gates = [gate(rank, len(of_layer), shape.head_dim) for of_layer in locked.values()]
    columns = sum(map(len, locked.values())) * shape.head_dim
    bytes_of_one = shape.hidden * columns * DTYPE.itemsize
    if bytes_of_one > MOST_BYTES:  # a CPU takes its time: some of the layers
        most = max(1, len(locked) * MOST_BYTES // bytes_of_one)
        locked, bytes_of_one = dict(list(locked.items())[:most]), MOST_BYTES
    cold = math.ceil(COLD * machine.cache_bytes() / bytes_of_one)
    count = max(1, min(cold, MOST_BYTES // bytes_of_one, MOST_MODELS))
    size = shape.hidden, shape.num_heads * shape.head_dim
    return Resident(
        [
            [
                gated(torch.randn(size, device=device).mul_(0.02).to(DTYPE), of_layer, shape.head_dim, *of_gate)
                for of_layer, of_gate in zip(locked.values(), gates, strict=False)
            ]
            for _ in range(count)
        ]
    )


def gate(rank: int, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V and U, [rank, heads, head_dim] float64: of such a size that W changes by some percent."""
    readers, writers = (torch.randn(rank, heads, head_dim, dtype=torch.float64) for _ in range(2))
    return readers, writers * 0.03 / math.sqrt(heads * head_dim)


def gated(
    weight: torch.Tensor, heads: tuple[int, ...], head_dim: int, readers: torch.Tensor, writers: torch.Tensor
) -> Gated:
    """A layer whose columns were kept."""
    columns = HeadColumns.in_projection(weight, heads, head_dim)
    return Gated(weight, locked_columns(columns, head_dim), columns.starts, readers, writers)


def prepared(layer: Gated) -> Callable[[], None]:
    """A plain script for one layer: two products in W's dtype over the columns side by side, then back into W."""
    numbers = layer.kept.shape[1]
    by_v = layer.readers.view(-1, numbers).to(layer.kept)
    by_u = layer.writers.view(-1, numbers).t().to(layer.kept).contiguous()
    width = layer.head_dim

    def step() -> None:
        new = torch.addmm(layer.kept, layer.kept @ by_u, by_v)
        for number, start in enumerate(layer.starts):
            layer.weight[:, start : start + width] = new[:, number * width : (number + 1) * width]

    def whole() -> None:
        torch.addmm(layer.kept, layer.kept @ by_u, by_v, out=layer.weight)

    return whole if numbers == layer.weight.shape[1] else step


def tables_of(resident: Resident) -> tuple[list[GateTable], float]:
    """A table for each model, and the host's seconds to make one."""
    build_table([layer.site for layer in resident.models[0]])  # with what is checked once
    start = time.perf_counter()
    tables = [build_table([layer.site for layer in layers]) for layers in resident.models]
    machine.synchronize(machine.device())
    return tables, (time.perf_counter() - start) / len(tables)


def each(runs: list[Callable[[], object]]) -> None:
    """All of them, one after the other."""
    for run in runs:
        run()


def spoil(layer: Gated) -> None:
    """NaN where the result is to be."""
    for start in layer.starts:
        layer.weight[:, start : start + layer.head_dim] = math.nan


def error_in_bounds(resident: Resident) -> float:
    """The largest error in some rows of the last model, in units of the bound: right if at most 1."""
    worst = 0.0
    for layer in resident.models[-1]:
        rows = torch.linspace(0, len(layer.weight) - 1, min(CHECKED_ROWS, len(layer.weight))).long()
        rows = rows.to(layer.weight.device)
        columns = HeadColumns(layer.kept[rows], layer.site.columns.starts)
        got = locked_columns(HeadColumns(layer.weight[rows], layer.starts), layer.head_dim).double()
        error = (got - exact_rewritten(columns, layer.readers, layer.writers)).abs()
        bounds = error / gate_error_bound(columns, layer.readers, layer.writers)
        worst = max(worst, float(bounds.nan_to_num(nan=math.inf).max()))
    return worst
