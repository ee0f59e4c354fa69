"""The fold, by every kind of kernel and by every path, on random checkpoints of the shapes of real models.

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

from bench.lib import fold_model, machine
from bench.lib.figures import interval_of_median
from bench.lib.paths import PATHS, Batch, Path
from bench.lib.tiny import sized
from bench.lib.workloads import COLD, MOST_MODELS, SHAPES, Zoo, errors, make_zoo
from fastlock.kernels.fold.launch import Table, build_table, launch
from fastlock.kernels.fold.variants import KINDS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ZOOS = [("8B", BF16), ("8B", FP16), ("8B", FP32), ("70B", BF16), ("70B", FP16)]
SECONDS = sized({"cpu": 1.5, "cuda": 0.4}, tiny={"cpu": 0.0, "cuda": 0.0})
ROUNDS = (9, 300)
DEVICE_ROUNDS = sized(40, 4)
# Of a CUDA graph: how often it runs, and how many launches it has at least.
GRAPH_ROUNDS, GRAPH_LAUNCHES = sized((15, 32), tiny=(1, 1))
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


# The zoo of the last ones is that of the first paths.
KIND_CASES = sorted(fold_model.WORKLOADS, key=lambda workload: (workload[0] == ZOOS[0][0], workload[1]))


@pytest.mark.skipif(machine.device().type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("shape", "count"), KIND_CASES)
def test_kinds(
    shape: str,
    count: int,
    zoo_of: Callable[[str, torch.dtype], Zoo],
    record_property: Callable[[str, object], None],
) -> None:
    """Every kind of kernel, in turn, on the same cold models."""
    zoo = zoo_of(shape, BF16)
    count = min(count, MOST_MODELS)
    if count > len(zoo.models):
        pytest.skip(f"memory for {len(zoo.models)} models, not {count}")
    batches = make_batches(zoo, by_path("launch"), count)
    tables = {kind: [table_of(batch, kind) for batch in batches] for kind in KINDS}
    times = times_in_turn(tables, zoo.device)
    graphs = graph_times_in_turn(tables)
    heads = [len(displacement.heads) for displacement in zoo.displacements.values()] * count
    for kind, of_kind in tables.items():
        batches[0].reset()
        launch(of_kind[0])
        machine.synchronize(zoo.device)
        error = errors(batches[0].columns, batches[0].values, batches[0].outs, batches[0].biases)
        variant = of_kind[0].variant
        row = row_of(zoo, by_path("launch"), count, len(batches), error) | {"path": "kind", "warm": False}
        row |= {"kind": kind, "variant": variant.name, "default": table_of(batches[0], None).variant.kind}
        row |= {"device_seconds": interval_of_median(times[kind]), "events_seconds": interval_of_median(times[NOTHING])}
        row |= {"graph_seconds": interval_of_median(graphs[kind])}
        row |= {"model_seconds": fold_model.seconds(heads, zoo.shape.hidden, fold_model.launched(variant))}
        record_property("row", row)
        assert error["bounds"] <= 1, kind


def by_path(name: str) -> Path:
    """The way to fold of a name."""
    return next(path for path in PATHS if path.name == name)


def table_of(batch: Batch, kind: str | None) -> Table:
    return build_table(batch.columns, batch.values, batch.biases, batch.outs, kind)


# What is timed beside the kinds: the two events alone.
NOTHING = "nothing"


def times_in_turn(tables: dict[str, list[Table]], device: torch.device) -> dict[str, list[float]]:
    """Seconds on the device between two events, of each kind and of NOTHING; each round begins with another one."""
    flush = torch.randn(FLUSH_BYTES // 4, device=device)

    def busy() -> None:
        for _ in range(FLUSHES):
            flush.sum()

    names = [*tables, NOTHING]
    times: dict[str, list[float]] = {name: [] for name in names}
    for of_kind in tables.values():  # what is compiled or loaded once
        launch(of_kind[0])
    for i in range(DEVICE_ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run = partial(launch, tables[name][i % len(tables[name])]) if name != NOTHING else lambda: None
            times[name].append(machine.between_events(run, busy))
    return {name: [seconds for seconds in of_name if not math.isnan(seconds)] for name, of_name in times.items()}


def graph_times_in_turn(tables: dict[str, list[Table]]) -> dict[str, list[float]]:
    """Seconds a launch, of many in one CUDA graph that rotates among the models: without events or gaps between."""
    graphs = {}
    for kind, of_kind in tables.items():
        graphs[kind] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[kind]):
            for table in itertools.islice(itertools.cycle(of_kind), launches_in_graph(of_kind)):
                launch(table)
    times: dict[str, list[float]] = {kind: [] for kind in graphs}
    for _ in range(GRAPH_ROUNDS):
        for kind, graph in graphs.items():
            seconds = machine.between_events(graph.replay, lambda: torch.cuda._sleep(WAIT))
            times[kind].append(seconds / launches_in_graph(tables[kind]))
    return {kind: [seconds for seconds in of_kind if not math.isnan(seconds)] for kind, of_kind in times.items()}


def launches_in_graph(tables: list[Table]) -> int:
    """Whole rotations, with GRAPH_LAUNCHES launches or more; a few of large ones, which take long."""
    return len(tables) * max(1, GRAPH_LAUNCHES // len(tables) if len(tables) > 1 else GRAPH_LAUNCHES // 8)


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
