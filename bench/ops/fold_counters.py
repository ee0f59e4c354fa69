"""What the GPU's own counters say of each kind of the fold kernel: NVIDIA's ncu, where it is and may read them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.lib import machine
from bench.lib.children import run_command

# Where the CUDA toolkit puts it, which need not be on the PATH.
TOOLKIT = "/usr/local/cuda/bin"
# What ncu says where only an administrator may read counters.
FORBIDDEN = "ERR_NVGPUCTRPERM"
# By its name in a row: ncu's metric.
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes_read.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "second": 1.0, "msecond": 1e-3, "usecond": 1e-6}
UNITS |= {"nsecond": 1e-9, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


@pytest.mark.skipif(machine.device().type == "cpu", reason="needs a GPU")
def test_counters(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Each kind on cold models, one launch of each."""
    ncu = shutil.which("ncu", path=os.pathsep.join([os.environ.get("PATH", ""), TOOLKIT]))
    if ncu is None:
        pytest.skip(f"ncu is neither on the PATH nor in {TOOLKIT}")
    log = tmp_path / "ncu.csv"
    command = [ncu, "--csv", "--page", "raw", "--log-file", str(log), "--metrics", ",".join(METRICS.values())]
    # At the clock that the other benchmarks have. The caches are emptied before each launch, which is ncu's default.
    command += ["--clock-control", "none", "--profile-from-start", "off", "--kernel-name", "fold_kernel"]
    try:
        said = run_command([*command, sys.executable, "-m", "bench.ops.fold_counters_once"])
    except RuntimeError as error:
        if FORBIDDEN in str(error) or FORBIDDEN in read(log):
            pytest.skip(f"ncu may not read the GPU's counters here ({FORBIDDEN})")
        raise
    launched = json.loads(said.splitlines()[-1])
    counted = counters(read(log))
    assert len(counted) == len(launched), read(log)[-2000:]
    for launch, numbers in zip(launched, counted, strict=True):
        record_property("row", launch | numbers)


def read(log: Path) -> str:
    return log.read_text(errors="replace") if log.is_file() else ""


def counters(text: str) -> list[dict[str, Any]]:
    """The metrics of each launch in ncu's raw CSV: names, then units, then a line for each launch."""
    names, units, *launches = csv.reader(line for line in text.splitlines() if line.startswith('"'))
    found = []
    for line in launches:
        values = dict(zip(names, zip(line, units, strict=True), strict=True))
        found.append(
            {
                key: float(number.replace(",", "")) * UNITS.get(unit, 1.0)
                for key, metric in METRICS.items()
                for number, unit in [values[metric]]
            }
        )
    return found
