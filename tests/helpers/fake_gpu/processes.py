"""Processes that find the fake GPU when they start: for `bench/run.py`, whose steps are processes.

Faults can be put into the steps of run.py, by their names.
"""

import atexit
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
GUARD, CUBINS = "guard.so", "cubins"
# Where a step that hangs says which child it left.
LEFT = "left-behind"
# The directory with all of it; which step has which fault, as JSON; and of whom the records are that a step writes.
PLACE, FAULTS, RECORDS = "FASTLOCK_FAKE_GPU", "FASTLOCK_FAKE_GPU_FAULTS", "FASTLOCK_BENCH_RECORDS"
START = "from tests.helpers.fake_gpu import processes\n\nprocesses.start()\n"


def build(place: Path) -> None:
    """What the processes need; skips the test where it cannot be compiled."""
    import pytest
    import torch

    from tests.helpers import fake_driver

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the fake GPU takes a C++ compiler, and there is none here")
    inside = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-w", f"-I{inside / 'include'}", str(HERE / "guard.cpp")]
    command += [f"-L{inside / 'lib'}", "-lc10", "-o", str(place / GUARD)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    aligned = [variant for variant in fake_driver.BY_NAME.values() if variant.aligned]
    fake_driver.write_folder(place / CUBINS, [fake_driver.describe(variant) for variant in aligned])
    (place / "sitecustomize.py").write_text(START)


def environment(place: Path, faults: Mapping[str, str] = {}) -> dict[str, str]:
    """Variables for them. Faults are "refused" (cubins, by the driver), "hangs" and "crashes", by the step's name."""
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {PLACE: str(place), FAULTS: json.dumps(faults), "PYTHONPATH": path}


def start() -> None:
    """Called as Python starts."""
    fault = json.loads(os.environ[FAULTS]).get(Path(os.environ.get(RECORDS, "")).stem)
    if fault == "hangs":
        hang()
    elif fault == "crashes":
        atexit.register(ctypes.string_at, 0)
    from fastlock.kernels.ahead_of_time import cubins, driver
    from tests.helpers.fake_gpu import api, operators

    place = Path(os.environ[PLACE])
    ctypes.CDLL(str(place / GUARD))
    kept.append(operators.register())
    api.install()
    if "TRITON_LIBCUDA_PATH" in os.environ:  # libcuda.py's driver: Triton's JIT compiles for it, and nothing is run
        return
    from tests.helpers import fake_driver
    from tests.helpers.fake_gpu import kernels

    kernels.install()
    library = fake_driver.FakeDriver()
    driver.open_library = lambda: library
    cubins.LOADER.folder = place / CUBINS
    if fault == "refused":
        library.fails["cuModuleLoadData"] = 209


kept: list = []


def hang() -> None:
    """Never end, if a test of this step has passed already; and leave a child in a session of its own."""
    records = Path(os.environ[RECORDS])
    if not records.is_file() or '"teardown", "outcome": "passed"' not in records.read_text():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep, start_new_session=True)
    Path(os.environ[PLACE], LEFT).write_text(str(child.pid))
    time.sleep(600)
