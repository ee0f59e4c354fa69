"""What `run.py --tiny` changes: small shapes, few rounds, a few cases of each test. Its numbers mean nothing.

It shows that everything runs, before a GPU is paid for, or on one of which only the time is short. As a pytest plugin
(`-p bench.lib.tiny`) it leaves out most cases.
"""

from __future__ import annotations

import os
from typing import TypeVar

import pytest

SWITCH = "FASTLOCK_BENCH_TINY"
ON = os.environ.get(SWITCH) == "1"
# Of each test function.
CASES = 2

_Size = TypeVar("_Size")


def sized(usual: _Size, tiny: _Size) -> _Size:
    """What a benchmark usually takes, or the small one."""
    return tiny if ON else usual


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test function the first case and the last."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(of_one[place]) for of_one in cases.values() for place in _places(len(of_one))}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _places(count: int) -> list[int]:
    return [round(i * (count - 1) / max(1, CASES - 1)) for i in range(CASES)]
