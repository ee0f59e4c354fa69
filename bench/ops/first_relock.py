"""The first relock of a fresh process: by a cubin, by Triton's JIT with what it compiled before, and without."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.lib import machine

WAYS = {"cubin": 3, "JIT, compiled before": 2, "JIT": 1}  # how many processes each


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Triton keeps what it compiled; empty at first."""
    return tmp_path_factory.mktemp("triton")


# The JIT's first process fills the cache for the others.
@pytest.mark.parametrize("way", list(reversed(WAYS)))
@pytest.mark.skipif(machine.device().type == "cpu", reason="on a CPU there is nothing to load or compile")
def test_first_relock(way: str, cache: Path, record_property: Callable[..., None]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FASTLOCK_CUBINS"}
    environment |= {} if way == "cubin" else {"FASTLOCK_CUBINS": "0", "TRITON_CACHE_DIR": str(cache / "cache")}
    found = [run(environment) for _ in range(WAYS[way])]
    row = {"way": way, "processes": len(found)}
    row |= {key: statistics.median(one[key] for one in found) for key in ("first", "second")}
    row["fastest"] = min(one["first"] for one in found)
    record_property("first", json.dumps(row))
    assert {one["by"] for one in found} == {"cubin" if way == "cubin" else "jit"}
    assert all(one["error_in_bounds"] <= 1 for one in found)


def run(environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.ops.first_relock_once"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
