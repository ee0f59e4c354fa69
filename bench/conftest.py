"""No network for the benchmarks, and one zoo of random checkpoints in memory at a time."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable

import pytest
import torch

from bench.lib import machine, workloads


@pytest.fixture(scope="session")
def zoo_of() -> Callable[[str, torch.dtype], workloads.Zoo]:
    """Makes the zoo of a shape and dtype, or gives the one made last; the copy bandwidth is measured just before."""
    held: dict[tuple[str, torch.dtype], workloads.Zoo] = {}

    def make(shape: str, dtype: torch.dtype) -> workloads.Zoo:
        if (shape, dtype) not in held:
            held.clear()
            device = machine.device()
            copy = machine.copy_bandwidth(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            empty = machine.empty_launch(device)
            held[shape, dtype] = workloads.make_zoo(workloads.SHAPES[shape], dtype, device, copy, empty)
        return held[shape, dtype]

    return make
