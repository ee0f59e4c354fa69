"""A script run by two processes at once, which find each other as the ranks of one group."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANKS = range(2)


def run_on_ranks(
    out: Path,
    module: str,
    arguments: Callable[[int], list[str]],
    environment: Callable[[int], dict[str, str]],
    *,
    timeout: int,
    weights_only: bool,
) -> list[Any]:
    """What each of two ranks left in `out`, as rank-0.pt and rank-1.pt; what they print is beside it.

    Args:
        out: an empty folder.
        module: what they run (`python -m`).
        arguments, environment: of a rank, further ones.
        timeout: how many seconds each may take.
        weights_only: how the results are loaded.
    """
    with contextlib.ExitStack() as running:
        processes = []
        for rank in RANKS:
            command = [sys.executable, "-m", module, str(out), *arguments(rank)]
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment(rank)}
            log = running.enter_context((out / f"log-{rank}").open("w"))
            process = running.enter_context(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
            running.callback(process.kill)  # before it is waited for
            processes.append(process)
        for rank, process in zip(RANKS, processes, strict=True):
            assert process.wait(timeout=timeout) == 0, (out / f"log-{rank}").read_text()[-3000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=weights_only) for rank in RANKS]
