"""NVIDIA's compute-sanitizer (memcheck) over every kernel: no access out of bounds."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from bench.lib import machine

SANITIZER = shutil.which("compute-sanitizer")
ERROR = 99


@pytest.mark.skipif(machine.device().type == "cpu", reason="needs a GPU")
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")
def test_memcheck() -> None:
    command = [str(SANITIZER), "--tool", "memcheck", "--target-processes", "application-only"]
    command += ["--error-exitcode", str(ERROR), sys.executable, "-m", "bench.ops.sanitized"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
