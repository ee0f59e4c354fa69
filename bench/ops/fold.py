"""The fold, by every path, on random checkpoints of the shape of Llama-3 8B and 70B.

The rounds of a benchmark rotate among models, so that caches are cold; or, warm, use one model again and again. What
the last timed round returned, into outputs filled with NaN before, is held against float64.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from bench.lib import machine
from bench.lib.figures import interval_of_median
from bench.lib.paths import PATHS, Batch, Path
from bench.lib.tiny import sized
from bench.lib.workloads import COLD, SHAPES, Zoo, errors, make_zoo

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ZOOS = [("8B", BF16), ("8B", FP16), ("8B", FP32), ("70B", BF16), ("70B", FP16)]
SECONDS = sized({"cpu": 1.5, "cuda": 0.4}, tiny={"cpu": 0, "cuda": 0})
ROUNDS = (9, 300)
DEVICE_ROUNDS = sized(40, 4)
# Read before each device timing of cold weights: it empties the L2, and keeps the GPU busy while the host queues.
FLUSH_BYTES, FLUSHES = sized(2**31, 2**16), 8
# Else the GPU waits: this many cycles, some 5 ms.
WAIT = 10**7
ABOUT_RIGHT = 0.02

ALL = 0
MANY = {"launch": (1, 2, 4, 8, 16, 32, 64), "plan": (1, 2, 4, 8, 16, 32, 64), "kernel": (1, 4), "relock": (1, 4)}
# The same model again and again, so that its columns may be in the cache.
WARM = ("launch", "plan", "columns", "linear", "authors")


def cases() -> Iterator[Any]:
    on_gpu = machine.device().type == "cuda"
    for shape, dtype in ZOOS:
        for path in PATHS:
            if dtype in path.dtypes and (on_gpu or not path.cuda):
                name = f"{shape}-{str(dtype).removeprefix('torch.')}-{path.name}"
                for count in counts(shape, dtype, path, on_gpu):
                    yield pytest.param(shape, dtype, path, count, False, id=f"{name}-{count or 'all'}")
                if shape == "8B" and dtype != FP32 and path.name in WARM:
                    yield pytest.param(shape, dtype, path, 1, True, id=f"{name}-warm")


def counts(shape: str, dtype: torch.dtype, path: Path, on_gpu: bool) -> tuple[int, ...]:
    """How many models in one call."""
    if (shape, dtype) != ZOOS[0] or path.name not in MANY:
        return (1,)
    return MANY[path.name] if on_gpu else (1, ALL)


@pytest.fixture(scope="module")
def zoo_of() -> Callable[[str, torch.dtype], Zoo]:
    """Makes the zoo of a shape and dtype, or gives the one made last; the copy bandwidth is measured just before."""
    held: dict[tuple[str, torch.dtype], Zoo] = {}

    def make(shape: str, dtype: torch.dtype) -> Zoo:
        if (shape, dtype) not in held:
            held.clear()
            device = machine.device()
            copy = machine.copy_bandwidth(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            empty = machine.empty_launch(device)
            held[shape, dtype] = make_zoo(SHAPES[shape], dtype, device, copy, empty)
        return held[shape, dtype]

    return make


@pytest.mark.parametrize(("shape", "dtype", "path", "count", "warm"), list(cases()))
def test_fold(
    shape: str,
    dtype: torch.dtype,
    path: Path,
    count: int,
    warm: bool,
    zoo_of: Callable[[str, torch.dtype], Zoo],
    record_property: Callable[[str, object], None],
    benchmark: Any,
) -> None:
    zoo = zoo_of(shape, dtype)
    count = count or len(zoo.models)
    if count > len(zoo.models):
        pytest.skip(f"memory for {len(zoo.models)} models, not {count}")
    batches = make_batches(zoo, path, count)[: 1 if warm else None]
    with torch.no_grad():
        times, results, last = time_rounds(benchmark, path, batches, zoo.device)
        error = errors(last.columns, last.values, results, last.biases)
        queued = path.queued and zoo.device.type == "cuda"
        on_device = device_times(path, batches, zoo.device, warm) if queued else []
    row = row_of(zoo, path, count, len(batches), error) | {"warm": warm}
    row |= {"seconds": interval_of_median(times), "fastest_seconds": min(times), "rounds": len(times)}
    row |= {"device_seconds": interval_of_median(on_device)}
    record_property("row", row)
    assert error["relative"] < ABOUT_RIGHT
    if path.exact:
        assert error["bounds"] <= 1


def row_of(zoo: Zoo, path: Path, models: int, batches: int, error: dict[str, float]) -> dict[str, Any]:
    """What was run on what, how many bytes count, and how right it was."""
    # The weights that the path must read, once, and the biases that it writes.
    moved = models * ((zoo.matrix_bytes if path.whole else zoo.locked_bytes) + zoo.bias_bytes)
    return {
        "shape": zoo.shape.name,
        "dtype": str(zoo.dtype).removeprefix("torch."),
        "path": path.name,
        "models": models,
        "starts_from": path.starts_from,
        "what": path.what,
        "lock": zoo.lock_source,
        "device": str(zoo.device),
        "bytes": moved,
        "rotated_bytes": batches * moved,
        "cold": batches * moved >= COLD * machine.cache_bytes(),
        "copy_bytes_per_second": zoo.copy,
        "empty_launch_seconds": zoo.empty,
        "matches": error["bounds"] <= 1,
        "error_in_bounds": error["bounds"],
        "relative_error": error["relative"],
    }


def make_batches(zoo: Zoo, path: Path, count: int) -> list[Batch]:
    """As many as a rotation needs to be cold, if there are so many."""
    needed = math.ceil(COLD * machine.cache_bytes() / (count * zoo.locked_bytes))
    batches = []
    for start in range(0, len(zoo.models) - count + 1, count)[:needed]:
        members = list(range(start, start + count))
        with_models = path.name in ("relock", "plan of models")
        batches.append(Batch(zoo, members, [zoo.shell(zoo.models[i]) for i in members] if with_models else []))
    return batches


def time_rounds(
    benchmark: Any, path: Path, batches: list[Batch], device: torch.device
) -> tuple[list[float], list[torch.Tensor], Batch]:
    """Seconds of whole calls by the host's clock, the device waited for; the last round's results and its batch."""
    rotation = itertools.cycle(batches)
    last = batches[0]

    def following() -> tuple[tuple[Batch], dict[str, Any]]:
        nonlocal last
        last = next(rotation)
        last.reset()
        machine.synchronize(device)
        return (last,), {}

    def run(batch: Batch) -> list[torch.Tensor]:
        results = path.run(batch)
        machine.synchronize(device)
        return results

    for _ in batches:  # whatever is compiled, prepared or cached once
        run(*following()[0])
    seconds = min(duration(run, *following()[0]) for _ in range(2))
    rounds = min(max(int(SECONDS[device.type] / seconds), ROUNDS[0]), ROUNDS[1])
    results = benchmark.pedantic(run, setup=following, rounds=rounds, iterations=1)
    return list(benchmark.stats.stats.data), results, last


def duration(run: Callable[[Batch], Any], batch: Batch) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def device_times(path: Path, batches: list[Batch], device: torch.device, warm: bool) -> list[float]:
    """Seconds between two events on the device around each call, with everything queued before the device starts."""
    flush = torch.randn(FLUSH_BYTES // 4, device=device)

    def busy() -> None:
        if warm:
            torch.cuda._sleep(WAIT)
        else:
            for _ in range(FLUSHES):
                flush.sum()

    times = []
    for batch in itertools.islice(itertools.cycle(batches), DEVICE_ROUNDS):
        batch.reset()
        if warm:
            path.run(batch)
        times.append(machine.between_events(partial(path.run, batch), busy))
    times = [seconds for seconds in times if not math.isnan(seconds)]
    return times if len(times) >= DEVICE_ROUNDS // 2 else []
