"""What a planned relock costs the host, the device's and the driver's own work apart.

A model of Llama-3 8B's shape, and a zoo of them as bare projections. The functions of the driver are replaced by C
functions that do nothing, and what is on the CPU counts as on a device: all of fastlock's own Python runs.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastlock
from bench.lib.figures import interval_of_median
from bench.lib.workloads import SHAPES, STRENGTH, Zoo, lock_for
from fastlock import fold as fold_module
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.manifest import Cubin
from fastlock.kernels.ahead_of_time.ways import WAYS
from fastlock.kernels.fold import launch as kernels

SHAPE = SHAPES["8B"]
ROUNDS, CALLS = 200, 10
LIBC = ctypes.CDLL(None)


class NoDriver:
    """A driver that does nothing, by functions of the C library that then return 0.

    The handles of the kernel and its context are 0: `ffs(0)` is 0, and so is the length of eight zero bytes as text.
    """

    def function_named(self, name: str) -> Any:
        return {"cuCtxGetCurrent": LIBC.strlen, "cuLaunchKernel": LIBC.ffs}[name]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    described = Cubin("", "sm_90a", "", "", "", tuple((8 * i, 8) for i in range(6)), 0, 8, 64, "12.8")
    kernel = cubins.Kernel(NoDriver(), described, 0, None, 0)  # type: ignore[arg-type]
    monkeypatch.setattr(cubins.LOADER, "choose", lambda variant, index: cubins.Choice(kernel, "it does nothing"))
    monkeypatch.setattr(cubins, "current_stream", lambda index: 0)
    monkeypatch.setattr(WAYS, "is_good", lambda kernel, index, way: True)
    monkeypatch.setattr(kernels, "cuda_index", lambda device: 0)
    monkeypatch.setattr(fold_module, "_way", lambda weight: fold_module._ByKernel)


@pytest.mark.parametrize("models", [1, 32])
@pytest.mark.usefixtures("stubbed")
def test_a_planned_relock(models: int, record_property: Callable[..., None]) -> None:
    lock, _ = lock_for(SHAPE)
    layers = list(lock.displacement(STRENGTH))
    # Only addresses are read, so one row of every weight is enough, and any number of zoos fits.
    weights = [torch.randn(1, SHAPE.num_heads * SHAPE.head_dim).bfloat16() for _ in range(models * len(layers))]
    zoo: list[Any] = [dict(zip(layers, weights[i * len(layers) :], strict=False)) for i in range(models)]
    record("bare projections", models, fastlock.Plan(zoo, anywhere(lock), STRENGTH), record_property)
    if models == 1:
        # To copy a whole model's biases is the device's work; to copy those of a few rows, the host's alone.
        for what, hidden in (("a model", SHAPE.hidden), ("a model of few rows", SHAPE.num_heads)):
            shape = replace(SHAPE, hidden=hidden)
            whole = [torch.randn(1).bfloat16().expand(hidden, shape.num_heads * shape.head_dim).clone() for _ in layers]
            model = Zoo(shape, torch.bfloat16, torch.device("cpu"), lock, "", [whole], 0, None).shell(whole)
            record(what, models, fastlock.Plan([model], anywhere(lock), STRENGTH), record_property)


def anywhere(lock: fastlock.Lock) -> fastlock.Lock:
    """The same rows, of a base of any size."""
    return fastlock.Lock(lock.layers, lock.heads, lock.directions, lock.scales)


def record(what: str, models: int, plan: fastlock.Plan, record_property: Callable[..., None]) -> None:
    plan.relock()
    inside: Any = plan._built
    parts = {
        "relock": plan.relock,
        "looking up": inside.moved,
        "launch": inside._plan._groups[0].start,
        "copying": inside._spare.take,
    }
    row: dict[str, Any] = {"what": what, "models": models, "sites": sum(map(len, plan.biases))}
    row |= {name: interval_of_median([seconds_of(run) for _ in range(ROUNDS)]) for name, run in parts.items()}
    record_property("row", row)


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call. As in timeit, garbage is collected only between the calls that are timed."""
    gc.collect(0)
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        return (time.perf_counter() - start) / CALLS
    finally:
        gc.enable()
