"""Resident adapters of one base, folded in one call: by our kernel, by the public call, and by torch's batched ops.

Random LoRAs of the shape of Llama-3 8B, stacked by layer as a server holds them. After the timed rounds some results,
into outputs filled with NaN before, are held against float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import fastlock
from bench.lib import machine
from bench.lib.figures import interval_of_median
from bench.lib.tiny import sized
from bench.lib.ways import seconds_of
from bench.lib.workloads import SHAPES, STRENGTH, Shape, lock_for
from fastlock.kernels.adapter_fold.launch import AdapterTable, build_table, launch
from fastlock.kernels.adapter_fold.reference import LowRankSite, adapter_error_bound, exact_adapter_fold
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.fold.reference import HeadColumns, exact_fold
from fastlock.locks.lock import Displacement
from fastlock.models.sites import BareProjections

BF16, FP32 = torch.bfloat16, torch.float32
ON_GPU = machine.device().type == "cuda"
ADAPTERS = sized(1000 if ON_GPU else 32, tiny=3)
ROUNDS = sized(20 if ON_GPU else 5, tiny=1)
# The GPU waits this many cycles, some 5 ms, while the host queues.
WAIT = sized(10**7, tiny=1000)
# Adapters whose results are held against float64: the first and the last.
CHECKED = (0, -1)
# Rank, dtype of the adapters; the base is in bfloat16.
CASES = [(16, BF16), (64, BF16), (16, FP32)]
SCALE = 0.5


@dataclass(frozen=True)
class Layer:
    """One locked layer: of all adapters A, [adapters, rank, width], and B, [adapters, hidden, rank]; the base's W."""

    displacement: Displacement
    down: torch.Tensor
    up: torch.Tensor
    weight: torch.Tensor
    shared: torch.Tensor
    out: torch.Tensor

    def sites(self) -> list[LowRankSite]:
        """Every adapter here."""
        starts = tuple(head * self.displacement.head_dim for head in self.displacement.heads)
        return [
            LowRankSite(HeadColumns(a, starts), self.displacement.values, b, SCALE, self.shared)
            for a, b in zip(self.down, self.up, strict=True)
        ]


@dataclass(frozen=True)
class Resident:
    """All adapters of one rank and dtype."""

    shape: Shape
    lock: fastlock.Lock
    layers: dict[int, Layer]

    @property
    def bytes(self) -> int:
        """Bytes that a fold of all must move: the locked columns of A, B, and the results; W d is shared."""
        moved = 0
        for layer in self.layers.values():
            columns = layer.displacement.values.numel() * layer.down.shape[1]
            moved += (columns + layer.up[0].numel()) * layer.up.itemsize + layer.out[0].numel() * layer.out.itemsize
        return moved * ADAPTERS


@pytest.fixture(scope="module")
def copy() -> float:
    """Bytes a second of a large copy, measured before all else."""
    return machine.copy_bandwidth(machine.device())


@pytest.mark.parametrize(("rank", "dtype"), CASES)
def test_adapters(rank: int, dtype: torch.dtype, copy: float, record_property: Callable[..., None]) -> None:
    device = machine.device()
    resident = make(rank, dtype, device)
    ways: dict[str, Callable[[], object]] = {"torch": partial(by_torch, resident), "call": partial(by_call, resident)}
    row: dict[str, Any] = {"launched_by": None}
    if ON_GPU:
        table, seconds = prepared(resident)
        ways = {"launch": partial(launch, table), **ways}
        row |= {"launched_by": "cubin" if isinstance(table.run, cubins.Launch) else "jit", "table_seconds": seconds}
    measured: dict[str, dict[str, Any]] = {}
    for name, run in ways.items():
        for layer in resident.layers.values():
            layer.out.fill_(math.nan)
        result = run()
        machine.synchronize(device)
        error = error_in_bounds(resident, result if isinstance(result, dict) else None)
        of_rounds = seconds_of(run, ROUNDS, WAIT if ON_GPU and name != "call" else None)
        measured[name] = {"seconds": interval_of_median(of_rounds), "error_in_bounds": error}
    row |= {"shape": resident.shape.name, "rank": rank, "dtype": str(dtype).removeprefix("torch."), "ways": measured}
    row |= {"adapters": ADAPTERS, "layers": len(resident.layers), "bytes": resident.bytes, "device": str(device)}
    record_property("row", row | {"copy_bytes_per_second": copy, "rounds": ROUNDS})
    assert all(measured[name]["error_in_bounds"] <= 1 for name in ("launch", "call") if name in measured)


def make(rank: int, dtype: torch.dtype, device: torch.device) -> Resident:
    """Random adapters and a random base."""
    torch.manual_seed(0)
    shape = SHAPES["8B"]
    lock, _ = lock_for(shape)
    width = shape.num_heads * shape.head_dim
    layers = {}
    for number, displacement in lock.displacement(STRENGTH).items():
        weight = torch.randn(shape.hidden, width, device=device).mul_(0.02).to(BF16)
        columns = HeadColumns.in_projection(weight, displacement.heads, shape.head_dim)
        layers[number] = Layer(
            displacement,
            torch.randn(ADAPTERS, rank, width, device=device, dtype=dtype).mul_(0.02),
            torch.randn(ADAPTERS, shape.hidden, rank, device=device, dtype=dtype).mul_(0.02),
            weight,
            exact_fold(columns, displacement.values).float(),
            torch.full((ADAPTERS, shape.hidden), math.nan, device=device, dtype=BF16),
        )
    return Resident(shape, lock, layers)


def prepared(resident: Resident) -> tuple[AdapterTable, float]:
    """The table of all adapters, and the host's seconds to make it again."""
    sites = [site for layer in resident.layers.values() for site in layer.sites()]
    outs = [out for layer in resident.layers.values() for out in layer.out]
    build_table(sites, outs)  # with what is checked once
    start = time.perf_counter()
    table = build_table(sites, outs)
    machine.synchronize(machine.device())
    return table, time.perf_counter() - start


def by_torch(resident: Resident) -> None:
    """Two batched products a layer, in the adapters' dtype, on the columns picked before."""
    for layer in resident.layers.values():
        picked = torch.cat([layer.down[:, :, start:end] for start, end in spans(layer)], dim=2)
        d = layer.displacement.values.flatten().to(picked)
        low_rank = torch.bmm(layer.up, (picked @ d)[:, :, None])[:, :, 0]
        layer.out.copy_(layer.shared + SCALE * low_rank)


def spans(layer: Layer) -> list[tuple[int, int]]:
    """The columns of each locked head."""
    width = layer.displacement.head_dim
    return [(head * width, (head + 1) * width) for head in layer.displacement.heads]


def by_call(resident: Resident) -> dict[int, torch.Tensor]:
    """`fastlock.fold_adapters`, from the adapters' matrices as they lie."""
    adapters = [
        {number: (layer.down[i], layer.up[i], SCALE) for number, layer in resident.layers.items()}
        for i in range(ADAPTERS)
    ]
    base: BareProjections = {number: layer.weight for number, layer in resident.layers.items()}
    return fastlock.fold_adapters(base, adapters, resident.lock, STRENGTH)


def error_in_bounds(resident: Resident, results: dict[int, torch.Tensor] | None) -> float:
    """The largest error of some adapters against float64, in units of the bound: right if at most 1."""
    worst = 0.0
    for number, layer in resident.layers.items():
        sites, out = layer.sites(), layer.out if results is None else results[number]
        for i in CHECKED:
            error = (out[i].double() - exact_adapter_fold(sites[i])).abs()
            bounds = error / adapter_error_bound(sites[i], out.dtype)
            worst = max(worst, float(bounds.nan_to_num(nan=math.inf).max()))
    return worst
