"""NVIDIA's compute-sanitizer (memcheck) over every kernel: no access out of bounds."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from bench.lib import machine
from bench.lib.children import run_command

# Where the CUDA toolkit puts it, which need not be on the PATH.
TOOLKIT = "/usr/local/cuda/bin"
ERROR = 99


@pytest.mark.skipif(machine.device().type == "cpu", reason="needs a GPU")
def test_memcheck() -> None:
    check_memory()


def check_memory() -> None:
    """Run it over sanitized.py."""
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), TOOLKIT]))
    if sanitizer is None:
        pytest.skip(f"compute-sanitizer is neither on the PATH nor in {TOOLKIT}")
    command = [sanitizer, "--tool", "memcheck", "--target-processes", "application-only"]
    # A call of the driver that fails is no access out of bounds: fastlock asks for parameters until there is none.
    command += ["--report-api-errors", "no", "--error-exitcode", str(ERROR)]
    said = run_command([*command, sys.executable, "-m", "bench.ops.sanitized"])
    assert "ERROR SUMMARY: 0 errors" in said, said[-4000:]
