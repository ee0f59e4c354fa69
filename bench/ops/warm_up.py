"""Pay for what the first process on a machine pays: reading libraries, starting CUDA; and say what is there.

The benchmarks after it find all of it in the page cache, and their time limits are for themselves. Whatever cannot be
done is said, and costs only itself. Run by `run.py --gpu` before anything else.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from bench.lib.recording import last_lines, record_row


def imports() -> str:
    """What the steps import, torch first."""
    for name in ("torch", "numpy", "triton", "transformers", "torch._dynamo", "fastlock.kernels.fold.launch"):
        importlib.import_module(name)
    return "torch, triton, transformers, fastlock"


def machine_found() -> str:
    """The machine, and CUDA's context on it."""
    from bench.lib import machine

    described = machine.describe()
    record_row({"on": machine.device().type, "machine": described})
    return described["device"]


def cublas() -> str:
    """The libraries for products of matrices, which are large."""
    import torch

    from bench.lib import machine

    device = machine.device()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        square = torch.ones(64, 64, dtype=dtype, device=device)
        (square @ square).sum().item()
    return "products of matrices"


def paths() -> str:
    """How the fold is launched."""
    from fastlock.kernels.launch_paths import launch_paths

    return "; ".join(f"{path.device}: by {path.path}: {path.reason}" for path in launch_paths())


PARTS: dict[str, Callable[[], str]] = {
    "imports": imports,
    "the machine": machine_found,
    "cuBLAS": cublas,
    "the fold's kernels": paths,
}


def main() -> None:
    for part, run in PARTS.items():
        start = time.perf_counter()
        try:
            found, done = run(), True
        except Exception as error:  # whatever it is, it is to be told
            found, done = " ".join(last_lines(f"{type(error).__name__}: {error}").split()), False
        row = {"part": part, "found": found, "done": done, "seconds": time.perf_counter() - start}
        print(f"{part}: {row['seconds']:.1f} s: {found}", flush=True)
        record_row(row)


if __name__ == "__main__":
    main()
