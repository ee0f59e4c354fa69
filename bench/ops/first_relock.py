"""The first relock of a fresh process: by a cubin, and by Triton's JIT with an empty cache and with a filled one."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.lib import machine
from bench.lib.children import run_module
from bench.lib.tiny import sized

# How many processes each. What matters most comes first; the JIT's first process fills the cache for the others.
WAYS = sized({"cubin": 3, "JIT": 1, "JIT, compiled before": 1}, tiny={"cubin": 1, "JIT": 1})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Triton keeps what it compiled; empty at first."""
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.skipif(machine.device().type == "cpu", reason="on a CPU there is nothing to load or compile")
def test_first_relock(way: str, cache: Path, record_property: Callable[[str, object], None]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FASTLOCK_CUBINS"}
    environment |= {} if way == "cubin" else {"FASTLOCK_CUBINS": "0", "TRITON_CACHE_DIR": str(cache / "cache")}
    relocks = [relock_once(environment) for _ in range(WAYS[way])]
    row: dict[str, Any] = {"way": way, "processes": len(relocks)}
    row |= {key: statistics.median(one[key] for one in relocks) for key in ("first", "second")}
    row["fastest"] = min(one["first"] for one in relocks)
    record_property("row", row)
    assert {one["by"] for one in relocks} == {"cubin" if way == "cubin" else "jit"}
    assert all(one["error_in_bounds"] <= 1 for one in relocks)


def relock_once(environment: dict[str, str]) -> dict[str, Any]:
    """What first_relock_once.py prints."""
    printed: dict[str, Any] = json.loads(run_module("bench.ops.first_relock_once", environment=environment))
    return printed
