"""`fastlock.relock_checkpoint` on checkpoints of real shapes: time, what it reads and writes, memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

import fastlock
from bench.lib.children import run_module
from bench.lib.figures import interval_of_median
from bench.lib.sparse_checkpoints import PROJECTION, SHAPES, lock_for, locked_ranges, sparse_checkpoint
from bench.lib.workloads import STRENGTH
from fastlock import Lock

ROUNDS, WARMUP, WHOLE_ROUNDS = 15, 1, 7
POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
CHUNK = 8 * 2**20
PAGE = mmap.PAGESIZE
# Beside the locked layers: what the kernel reads ahead of a file's header, as much as any small file.
READ_AHEAD = 128 * 1024
MARGIN = 8 * 2**20
MOST_MEMORY = 200 * 10**6


@dataclass(frozen=True)
class Disk:
    """A checkpoint on disk, its lock, and room for what is made of it."""

    shape: str
    folder: Path
    lock: Lock
    lock_source: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @functools.cached_property
    def ranges(self) -> list[tuple[Path, int, int]]:
        return locked_ranges(self.source, self.lock)

    @property
    def locked_bytes(self) -> int:
        """Of the whole output projections of the locked layers."""
        return sum(length for _, _, length in self.ranges)

    @property
    def column_bytes(self) -> int:
        """Of their locked columns."""
        return self.lock.directions.numel() * SHAPES[self.shape].hidden * 2

    def new(self) -> Path:
        return self.folder / f"out{next(self._numbers)}"


@pytest.fixture(scope="module")
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with tempfile.TemporaryDirectory(prefix="fastlock-bench-") as folder:
        made = Disk(request.param, Path(folder), *lock_for(request.param))
        sparse_checkpoint(made.source, request.param, made.lock, margin=0 if request.param == "135m" else MARGIN)
        yield made


@pytest.mark.parametrize("disk", ["8b", "70b"], indirect=True)
@pytest.mark.parametrize("pages", ["large", "small"])
def test_times(disk: Disk, pages: str, record_property: Callable[[str, object], None]) -> None:
    fill_cache(disk, pages)
    huge = [huge_fraction(disk)]
    sizes = [path.stat().st_size for path in new_files(disk, relock(disk))]
    ways = {
        "populate": lambda: populate(disk),
        "read and fold": lambda: read_and_fold(disk),
        "write": lambda: write(disk, sizes),
        "relock_checkpoint": lambda: relock(disk),
    }
    seconds = interleaved(ways, ROUNDS)
    huge.append(huge_fraction(disk))
    record(record_property, disk, "times", rows(seconds), pages=pages, huge=huge, locked_bytes=disk.locked_bytes)


@pytest.mark.parametrize("disk", ["135m"], indirect=True)
def test_against_loading(disk: Disk, record_property: Callable[[str, object], None]) -> None:
    ways = {"load, add, save": lambda: load_and_save(disk), "relock_checkpoint": lambda: relock(disk)}
    record(record_property, disk, "loading", rows(interleaved(ways, WHOLE_ROUNDS)), locked_bytes=disk.locked_bytes)


@pytest.mark.parametrize("disk", ["8b", "70b", "123b"], indirect=True)
def test_reads_writes_memory(disk: Disk, record_property: Callable[[str, object], None]) -> None:
    caches = ["cold", "warm"] if disk.shape == "8b" else ["cold"]
    seen = {cache: watched(disk, cache) for cache in caches}
    small = small_bytes(disk.source)
    record(record_property, disk, "watched", seen, locked_bytes=disk.locked_bytes, small_bytes=small)
    reads = disk.locked_bytes + 2 * PAGE * len(disk.ranges) + small
    for each in seen.values():
        assert each["read_bytes"] <= reads
        assert each["peak_bytes"] < MOST_MEMORY


def record(record_property: Callable[[str, object], None], disk: Disk, kind: str, rows: Any, **more: Any) -> None:
    row = {"kind": kind, "shape": disk.shape, "lock": disk.lock_source, "column_bytes": disk.column_bytes}
    record_property("row", row | more | {"rows": rows})


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns: what disturbs the machine disturbs all. What a way leaves open is closed after."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(WARMUP + rounds):
        for name, way in ways.items():
            with contextlib.ExitStack() as after:
                start = time.perf_counter()
                left = way()
                took = time.perf_counter() - start
                if isinstance(left, contextlib.ExitStack):
                    after.push(left)
            if i >= WARMUP:
                seconds[name].append(took)
    return seconds


def rows(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians with intervals; also of the last way's time over each other's, in the same round."""
    *_, (_, ours) = seconds.items()
    return {
        name: {
            "seconds": interval_of_median(times),
            "fastest_seconds": min(times),
            "rounds": len(times),
            "ours_over_this": interval_of_median([a / b for a, b in zip(ours, times, strict=True)]),
        }
        for name, times in seconds.items()
    }


def populate(disk: Disk) -> contextlib.ExitStack:
    """Fresh mappings of the locked layers' whole output projections, with every page there."""
    mapped = contextlib.ExitStack()
    for path, start, length in disk.ranges:
        with path.open("rb", buffering=0) as file:
            mapped.callback(mapping(file.fileno(), start, length).close)
    return mapped


def mapping(fd: int, start: int, length: int, *advice: int) -> mmap.mmap:
    """A range of a file, mapped, with every page there."""
    before = start % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(fd, before + length, prot=mmap.PROT_READ, offset=start - before)
    for each in advice:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(each)
    mapped.madvise(POPULATE_READ)
    return mapped


def read_and_fold(disk: Disk) -> list[torch.Tensor]:
    """Plain PyTorch: the whole output projections of the locked layers by safetensors, and W d in their dtype."""
    names = {PROJECTION.format(layer): d for layer, d in displacements(disk).items()}
    biases = []
    for path in dict.fromkeys(path for path, _, _ in disk.ranges):
        with safe_open(path, framework="pt") as shard:
            for name in sorted(names.keys() & shard.keys()):
                weight = shard.get_tensor(name)
                biases.append(functional.linear(names[name].to(weight), weight))
    return biases


def displacements(disk: Disk) -> dict[int, torch.Tensor]:
    """d of each locked layer as a whole vector."""
    width = SHAPES[disk.shape].projection[1]
    return {layer: d.dense(width) for layer, d in disk.lock.displacement(STRENGTH).items()}


def write(disk: Disk, sizes: list[int]) -> None:
    """As many files of the same sizes, in a new directory: each synced, and the directory and its parent."""
    out = disk.new()
    out.mkdir()
    for i, size in enumerate(sizes):
        with (out / str(i)).open("xb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    for directory in (out, out.parent):
        sync(directory)


def relock(disk: Disk) -> Path:
    """From the call until it is all on disk: `relock_checkpoint` syncs what it writes."""
    out = disk.new()
    fastlock.relock_checkpoint(disk.source, disk.lock, out, STRENGTH)
    return out


def load_and_save(disk: Disk) -> None:
    """The authors' way: load everything, put the biases in, save everything; nothing is synced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(disk.source, dtype=torch.bfloat16)
    for layer, d in displacements(disk).items():
        projection = model.model.layers[layer].self_attn.o_proj
        with torch.no_grad():
            projection.bias = torch.nn.Parameter(functional.linear(d.to(projection.weight), projection.weight))
    out = disk.new()
    model.save_pretrained(out)
    shutil.rmtree(out)


def new_files(disk: Disk, out: Path) -> list[Path]:
    """What relocking made that is no link to a file of the source."""
    old = {path.stat().st_ino for path in disk.source.iterdir()}
    return [path for path in out.rglob("*") if path.is_file() and path.stat().st_ino not in old]


def small_bytes(directory: Path) -> int:
    """What must be read beside weights, in whole pages and with the kernel's read-ahead: headers, index, config."""
    total = 0
    for path in directory.iterdir():
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                size = 8 + int.from_bytes(file.read(8), "little")
        total += -(-size // PAGE) * PAGE + READ_AHEAD
    return total


def drop_cache(directory: Path) -> None:
    """Let the kernel forget the content of every file of a directory."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(disk: Disk, pages: str) -> None:
    """Read the locked layers into an empty page cache: in large folios if the file system has them, or in 4 kB."""
    drop_cache(disk.source)
    for path, start, length in disk.ranges:
        with path.open("rb", buffering=0) as file:
            if pages == "large":
                mapping(file.fileno(), start, length, mmap.MADV_HUGEPAGE).close()
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for offset in range(start, start + length, CHUNK):
                    os.pread(file.fileno(), min(CHUNK, start + length - offset), offset)


def huge_fraction(disk: Disk) -> float | None:
    """The part of the locked layers that is mapped by whole 2 MiB pages; None where the kernel does not say."""
    with populate(disk):
        maps = Path("/proc/self/smaps").read_text()
    # An entry begins with its addresses and ends with its path; of its fields, one says how much is mapped so.
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)
    found = [re.search(r"FilePmdMapped:\s+(\d+) kB", entry) for entry in entries if str(disk.source) in entry]
    return sum(int(each[1]) * 1024 for each in found if each) / disk.locked_bytes if all(found) else None


def watched(disk: Disk, cache: str) -> dict[str, Any]:
    """Relock in a fresh process that did it once already with a tiny checkpoint; see `watch`."""
    with tempfile.TemporaryDirectory(prefix="fastlock-bench-") as folder:
        tiny = Disk("tiny", Path(folder), *lock_for("tiny"))
        sparse_checkpoint(tiny.source, "tiny", tiny.lock)
        tiny.lock.save(tiny.folder / "lock.safetensors")
        disk.lock.save(tiny.folder / "wanted.safetensors")
        out = disk.new()
        arguments = [cache, str(tiny.folder), str(disk.source), str(out)]
        seen: dict[str, Any] = json.loads(run_module("bench.disk.checkpoints", *arguments))
    return seen | {"new_bytes": sum(path.stat().st_size for path in new_files(disk, out))}


def watch(cache: str, folder: Path, source: Path, out: Path) -> dict[str, Any]:
    """Relock once, and what this process read from the disk, wrote to it and held in memory meanwhile.

    Bytes are those that /proc/self/io counts; memory is the highest resident set over that just before, which counts
    the mapped pages of files too.
    """
    tiny, lock = Lock.load(folder / "lock.safetensors"), Lock.load(folder / "wanted.safetensors")
    fastlock.relock_checkpoint(folder / "source", tiny, folder / "warm")
    if cache == "cold":
        drop_cache(source)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is the one of now
    before, read, written = proc("status", "VmRSS") * 1024, proc("io", "read_bytes"), proc("io", "write_bytes")
    start = time.perf_counter()
    fastlock.relock_checkpoint(source, lock, out, STRENGTH)
    return {
        "seconds": time.perf_counter() - start,
        "read_bytes": proc("io", "read_bytes") - read,
        "write_bytes": proc("io", "write_bytes") - written,
        "peak_bytes": proc("status", "VmHWM") * 1024 - before,
    }


def proc(file: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+)", Path(f"/proc/self/{file}").read_text(), re.MULTILINE)
    assert found, f"/proc/self/{file} has no {key}"
    return int(found[1])


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(json.dumps(watch(sys.argv[1], *map(Path, sys.argv[2:]))))
