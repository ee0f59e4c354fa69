"""The fold, by every path, on random checkpoints of the shape of Llama-3 8B and 70B; see run.py.

The rounds of a benchmark rotate among models, so that caches are cold. What the last timed round returned, into
outputs filled with NaN before, is held against float64.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import machine
from paths import PATHS, Batch, Path
from report import interval_of_median
from workloads import COLD, Zoo, errors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ZOOS = [("8B", BF16), ("8B", FP16), ("8B", FP32), ("70B", BF16), ("70B", FP16)]
SECONDS = {"cpu": 1.5, "cuda": 0.5}
ROUNDS = (9, 300)
DEVICE_ROUNDS = 40
# Read before each device timing: it empties the L2, and keeps the GPU busy while the host queues what is timed.
FLUSH_BYTES, FLUSHES = 2**31, 20
ABOUT_RIGHT = 0.02


ALL = 0


def cases() -> Iterator[Any]:
    on_gpu = machine.device().type == "cuda"
    for shape, dtype in ZOOS:
        for path in PATHS:
            if dtype in path.dtypes and (on_gpu or not path.cuda):
                for count in counts(shape, dtype, path, on_gpu):
                    name = f"{shape}-{str(dtype).removeprefix('torch.')}-{path.name}-{count or 'all'}"
                    yield pytest.param(shape, dtype, path, count, id=name)


def counts(shape: str, dtype: torch.dtype, path: Path, on_gpu: bool) -> tuple[int, ...]:
    """How many models in one call."""
    if (shape, dtype) != ZOOS[0] or path.name not in ("kernel", "launch", "relock"):
        return (1,)
    return (1, 4, ALL) if on_gpu else (1, ALL)


@pytest.mark.parametrize(("shape", "dtype", "path", "count"), list(cases()))
def test_fold(
    benchmark: Any, zoo_of: Callable[..., Zoo], shape: str, dtype: torch.dtype, path: Path, count: int
) -> None:
    zoo = zoo_of(shape, dtype)
    count = count or len(zoo.models)
    if count > len(zoo.models):
        pytest.skip(f"memory for {len(zoo.models)} models, not {count}")
    batches = make_batches(zoo, path, count)
    with torch.no_grad():
        results, last = time_rounds(benchmark, path, batches, zoo.device)
        error = errors(last.weights, last.displacements, results, last.biases)
        on_device = device_times(path, batches, zoo.device) if path.queued and zoo.device.type == "cuda" else []
    moved = count * ((zoo.matrix_bytes if path.whole else zoo.locked_bytes) + zoo.bias_bytes)
    rotated = len(batches) * moved
    benchmark.extra_info.update(
        shape=zoo.shape.name,
        dtype=str(zoo.dtype).removeprefix("torch."),
        path=path.name,
        models=count,
        starts_from=path.starts_from,
        what=path.what,
        lock=zoo.lock_source,
        device=str(zoo.device),
        bytes=moved,
        rotated_bytes=rotated,
        cold=rotated >= COLD * machine.cache_bytes(),
        copy_bytes_per_second=zoo.copy,
        matches=error["bounds"] <= 1,
        error_in_bounds=error["bounds"],
        relative_error=error["relative"],
        device_seconds=interval_of_median(on_device),
    )
    assert error["relative"] < ABOUT_RIGHT
    if path.exact:
        assert error["bounds"] <= 1


def make_batches(zoo: Zoo, path: Path, count: int) -> list[Batch]:
    shells = zoo.shells() if path.name == "relock" else []
    starts = range(0, len(zoo.models) - count + 1, count)
    return [Batch(zoo, list(range(start, start + count)), shells) for start in starts]


def time_rounds(
    benchmark: Any, path: Path, batches: list[Batch], device: torch.device
) -> tuple[list[torch.Tensor], Batch]:
    """Time whole calls by the host's clock, the device waited for; the last round's result and its batch."""
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
    return benchmark.pedantic(run, setup=following, rounds=rounds, iterations=1), last


def duration(run: Callable[[Batch], Any], batch: Batch) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def device_times(path: Path, batches: list[Batch], device: torch.device) -> list[float]:
    """Seconds between two events on the device around each call, with everything queued before the device starts."""
    flush = torch.randn(FLUSH_BYTES // 4, device=device)
    times = []
    for batch in itertools.islice(itertools.cycle(batches), DEVICE_ROUNDS):
        batch.reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            flush.sum()
        start.record()
        path.run(batch)
        end.record()
        all_queued = not start.query()  # otherwise the host's pace is in the time
        machine.synchronize(device)
        if all_queued:
            times.append(start.elapsed_time(end) / 1000)
    return times if len(times) >= DEVICE_ROUNDS // 2 else []
