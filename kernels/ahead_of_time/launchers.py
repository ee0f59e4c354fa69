"""What the launches of all kernels share: the device's index, memory to send from, and the ways of a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch

from fastlock.kernels.ahead_of_time import cubins

# Given the arguments of a kernel and its grid, as its room has them: the launch as a function of nothing.
AnyLauncher: TypeAlias = Callable[..., Callable[[], None]]


def cuda_index(device: torch.device) -> int | None:
    """torch's index of a CUDA device; None for any other device."""
    return device.index if device.type == "cuda" else None


def on_host(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers in the host's memory, [length], for a device: pinned for CUDA, which then reads and writes them itself.

    CUDA C++ Programming Guide, "Unified Virtual Address Space": a kernel may use such an address unchanged. torch does
    not hand pinned memory out again before the copies from it have run, even if the tensor is gone by then; of kernels
    that write to it torch knows nothing.
    """
    return torch.empty(length, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def ways_of(name: str, index: int | None, by_cubin: AnyLauncher, by_jit: AnyLauncher | None) -> dict[str, AnyLauncher]:
    """How a variant may be launched on a device, best first: by its cubin, or by Triton's JIT.

    Args:
        name: of the variant.
        index: as of `cuda_index`.
        by_cubin: a launcher that is given the cubin's kernel first.
        by_jit: the launcher that Triton is behind; None where there is no Triton.
    """
    kernel = None if index is None else cubins.LOADER.choose(name, index).kernel
    ways: dict[str, AnyLauncher] = {} if kernel is None else {"cubin": partial(by_cubin, kernel)}
    return ways if by_jit is None else ways | {"jit": by_jit}


def by_cubin(
    kernel: cubins.Kernel, arguments: Sequence[torch.Tensor], grid: tuple[int, int, int]
) -> Callable[[], None]:
    """The launch of a cubin, with the addresses of its arguments packed."""
    return kernel.launcher(grid, [argument.data_ptr() for argument in arguments])
