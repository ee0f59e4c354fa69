"""The machine that the benchmarks run on: what it is, and how fast it copies memory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.lib.tiny import sized

REPOSITORY = Path(__file__).resolve().parents[2]
# The folders with all that a result depends on.
SOURCES = ("fastlock", "kernels", "bench")
UNKNOWN_CACHE_BYTES = 256 * 2**20
COPY_BYTES = sized({"cpu": 2**29, "cuda": 2**31}, {"cpu": 2**20, "cuda": 2**20})
COPIES = 15


def device() -> torch.device:
    """The first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict[str, str]:
    """What a result must say of the machine and the software, as text."""
    on_gpu = device().type == "cuda"
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "pytest-benchmark", "fastlock")}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {_cpu_model()}",
        "device driver": _driver() if on_gpu else "none",
        "CUDA of torch": str(torch.version.cuda),
        "cache": f"{cache_bytes() / 2**20:.0f} MiB ({'L2 of the GPU' if on_gpu else 'last level, as the kernel says'})",
        "host": f"{_cpu_model()}, {torch.get_num_threads()} threads, {platform.system()} {platform.release()}",
        "load average before": f"{os.getloadavg()[0]:.2f} (above 0, others were using the cores too)",
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "sources": f"sha256 {_sources_digest()} over {', '.join(f'{room}/**/*.py' for room in SOURCES)}",
    }


def cache_bytes() -> int:
    """Bytes of the device's last cache before memory; 256 MiB where a CPU does not say."""
    if device().type == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [_text(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=UNKNOWN_CACHE_BYTES)


def copy_bandwidth(on: torch.device) -> float:
    """Bytes a second of `copy_` between two large buffers, read plus written, median of 15 copies."""
    source = torch.randn(COPY_BYTES[on.type] // 4, device=on)
    target = torch.empty_like(source)
    times = []
    for _ in range(COPIES + 2):
        synchronize(on)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(on)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES[on.type] / statistics.median(times[2:])


def empty_launch(on: torch.device) -> float | None:
    """Seconds on the device from an event to the next with the kernel between, on one row of weights; None on a CPU."""
    if on.type == "cpu":
        return None
    from fastlock.kernels.fold.launch import build_table, launch
    from fastlock.kernels.fold.reference import HeadColumns

    weight, values = torch.randn(1, 128, device=on).bfloat16(), torch.randn(1, 128)
    out = weight.new_empty(1)
    table = build_table([HeadColumns(weight, (0,))], [values], [None], [out])
    return statistics.median(between_events(lambda: launch(table), lambda: torch.cuda._sleep(10**6)) for _ in range(41))


def between_events(run: Callable[[], object], busy: Callable[[], object]) -> float:
    """Seconds on the device around what `run` queues there, all of it queued while `busy` still runs; else NaN."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    busy()
    start.record()
    run()
    end.record()
    all_queued = not start.query()  # otherwise the host's pace is in the time
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 if all_queued else math.nan


def synchronize(on: torch.device) -> None:
    """Wait for the device."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    if package == "fastlock":
        import fastlock

        return fastlock.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return _output(query) or _text(Path("/proc/driver/nvidia/version")).partition("\n")[0] or "unknown"


def _cpu_model() -> str:
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    commit = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain", *(f"{room}/**.py" for room in SOURCES)])
    return commit + (" and changes" if changed else "") if commit else "not known here: see sources"


def _sources_digest() -> str:
    """Over every Python file that a result may depend on, its name included."""
    sha = hashlib.sha256()
    for path in sorted(path for room in SOURCES for path in (REPOSITORY / room).rglob("*.py")):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(REPOSITORY)} {len(content)}\n".encode() + content)
    return sha.hexdigest()[:16]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
