"""What would fold on each of this machine's devices, why, and what is wrong: a cubin, Triton's JIT, the reference."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastlock.errors import FastlockWarning
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.ways import WAYS, NoWayError, reason_of
from fastlock.kernels.fold.launch import build_table
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.fold.variants import Variant, default_variant, variants

# What is compiled and checked where Triton's JIT has to fold; every other kernel is on its first launch.
BY_JIT = default_variant(torch.bfloat16, torch.bfloat16, 128, transposed=False, aligned=True)


@dataclass(frozen=True)
class LaunchPath:
    """What folds on one of this machine's devices.

    Attributes:
        device: its name.
        path: "cubin" (a kernel that was compiled ahead of time), "jit" (Triton compiles it on its first launch) or
            "reference" (plain PyTorch).
        reason: one sentence for people.
        faults: what is wrong: a sentence for each way of running a kernel that failed its check there.
    """

    device: str
    path: str
    reason: str
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return asdict(self)


def launch_paths() -> list[LaunchPath]:
    """What folds on each CUDA device of this machine, and on the CPU.

    To find out, all cubins that fit are loaded, and launched once on a few made-up weights, whose folds are compared
    with the reference's; or one kernel, that Triton compiles.
    """
    paths = [_path_on(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    why = "on a CPU, plain PyTorch folds, in float64"
    return [*paths, LaunchPath("CPU", "reference", why if paths else f"{why}; torch finds no CUDA device")]


def _path_on(index: int) -> LaunchPath:
    device = f"cuda:{index}, {torch.cuda.get_device_name(index)}"  # which initialises CUDA as well
    choices = cubins.LOADER.choices(index)
    loaded = {choice.kernel.cubin.variant: choice.kernel for choice in choices if choice.kernel is not None}
    has_triton = importlib.util.find_spec("triton") is not None
    wanted = [variant for variant in variants() if variant.name in loaded]
    if len(loaded) < len(choices) and has_triton and BY_JIT not in wanted:
        wanted.append(BY_JIT)
    faults = _try_out(wanted, index)
    kernels = [kernel for name, kernel in loaded.items() if not WAYS.is_bad(f"fold {name}", index, "cubin")]
    if len(kernels) == len(choices):
        first = kernels[0].cubin
        made = f"compiled ahead of time for {first.target} by ptxas {first.ptxas}, load and are launched by the driver"
        reason = f"{len(kernels)} kernels, {made}; what they do not cover is left to the JIT"
        return LaunchPath(device, "cubin", reason, faults)
    reason = next((choice.reason for choice in choices if choice.kernel is None), "they do not fold as they should")
    if not has_triton or any(WAYS.is_bad(f"fold {variant.name}", index, "jit") for variant in wanted):
        jit = "Triton's kernel is not used either" if has_triton else "Triton is not installed"
        if kernels:
            reason = f"{len(kernels)} of {len(choices)} kernels load and are launched by the driver; of others {reason}"
            return LaunchPath(device, "cubin", f"{reason}; and {jit}: plain PyTorch folds the rest, in float64", faults)
        reason = f"no cubin is used: {reason}; and {jit}: plain PyTorch folds, in float64"
        return LaunchPath(device, "reference", reason, faults)
    part = f" for {len(choices) - len(kernels)} of {len(choices)} kernels" if kernels else ""
    return LaunchPath(device, "jit", f"Triton compiles on the first launch{part}: {reason}", faults)


def _try_out(wanted: Sequence[Variant], index: int) -> tuple[str, ...]:
    """Check variants on a device, and say what is wrong there in this process."""
    untold: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastlockWarning)  # they say what is returned
        for variant in wanted:
            try:
                _make_table(variant, device_of(index))
            except NoWayError:
                pass
            except Exception as error:  # no memory, a broken device: there is still something to tell
                untold.append(f"the kernel fold {variant.name} could not be tried: {reason_of(error)}")
    return (*(bad.sentence for bad in WAYS.bad(index)), *untold)


def device_of(index: int) -> torch.device:
    """The CUDA device of an index."""
    return torch.device("cuda", index)


def _make_table(variant: Variant, device: torch.device) -> None:
    """The table of a small site, which checks the variant if nothing has yet."""
    lines, length = (2 * variant.head_dim, 64) if variant.transposed else (64, 2 * variant.head_dim)
    numbers = torch.arange(lines * length, dtype=torch.float32, device="cpu").mul(37).remainder(101).sub(50).div(64)
    weight = numbers.view(lines, length).to(device, variant.dtype)
    columns = HeadColumns(weight.t() if variant.transposed else weight, (0, variant.head_dim))
    values = torch.ones(2, variant.head_dim, dtype=torch.float64, device="cpu")
    out = torch.empty(64, dtype=variant.out_dtype, device=device)
    build_table([columns], [values], [None], [out], variant.kind)
