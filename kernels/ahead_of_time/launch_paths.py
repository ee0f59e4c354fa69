"""What would fold on each of this machine's devices: a cubin, Triton's JIT, the reference, or nothing; and why."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastlock.kernels.ahead_of_time import cubins


@dataclass(frozen=True)
class LaunchPath:
    """What folds on one of this machine's devices.

    Attributes:
        device: its name.
        path: "cubin" (a kernel that was compiled ahead of time), "jit" (Triton compiles it on its first launch),
            "reference" (plain PyTorch) or "none".
        reason: one sentence for people.
    """

    device: str
    path: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return asdict(self)


def launch_paths() -> list[LaunchPath]:
    """What folds on each CUDA device of this machine, and on the CPU. To find out, all cubins that fit are loaded."""
    paths = [_path_on(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    why = "on a CPU, plain PyTorch folds, in float64"
    return [*paths, LaunchPath("CPU", "reference", why if paths else f"{why}; torch finds no CUDA device")]


def _path_on(index: int) -> LaunchPath:
    device = f"cuda:{index}, {torch.cuda.get_device_name(index)}"  # which initialises CUDA as well
    choices = cubins.LOADER.choices(index)
    kernels = [choice.kernel for choice in choices if choice.kernel is not None]
    if len(kernels) == len(choices):
        first = kernels[0].cubin
        made = f"compiled ahead of time for {first.target} by ptxas {first.ptxas}, load and are launched by the driver"
        return LaunchPath(device, "cubin", f"{len(kernels)} kernels, {made}; what they do not cover is left to the JIT")
    reason = next(choice.reason for choice in choices if choice.kernel is None)
    if importlib.util.find_spec("triton") is None:
        return LaunchPath(device, "none", f"no cubin fits: {reason}; and Triton is not installed")
    part = f" for {len(choices) - len(kernels)} of {len(choices)} kernels" if kernels else ""
    return LaunchPath(device, "jit", f"Triton compiles on the first launch{part}: {reason}")
