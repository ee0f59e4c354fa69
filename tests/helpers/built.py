"""What the kernels' build makes of an op, compiled by another process.

This one may have Triton's interpreter, which cannot compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastlock.kernels.ahead_of_time.manifest import cubin_of

REPORTS, CUBINS = "reports.json", "cubins"


def build(op: str, folder: Path, *arguments: str) -> Path:
    """Compile an op into a folder: its reports, and what `arguments` ask for beside."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastlock.kernels.build", "--only", op, *arguments]
    command += ["--json", str(folder / REPORTS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def build_sample(op: str, folder: Path) -> Path:
    """Compile CI's sample, its cubins too."""
    return build(op, folder, "--jobs", "1", "--cubins", str(folder / CUBINS))


def reports_in(folder: Path) -> list[Any]:
    """The reports of a build."""
    from fastlock.kernels.ahead_of_time.compile import Report  # it imports Triton

    found = json.loads((folder / REPORTS).read_text())
    described = [None if report["cubin"] is None else cubin_of(report["cubin"]) for report in found]
    return [Report(**report | {"cubin": cubin}) for report, cubin in zip(found, described, strict=True)]
