"""What fastlock gives the driver, against what Triton's own launcher gives it for the same table."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
LAUNCHES = 1000  # as launched_twice.py does it
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
COMPILER = shutil.which("gcc") or shutil.which("cc")
PYTHON_H = Path(sysconfig.get_path("include"), "Python.h")


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory) -> Path:
    """A folder with recording_cuda.c as libcuda.so.1; functions that it lacks and Triton links to return an error."""
    if COMPILER is None or not PYTHON_H.is_file():
        pytest.skip("Triton compiles its launcher with a C compiler and Python.h; one of them is not here")
    folder = tmp_path_factory.mktemp("libcuda")
    source = (HERE / "recording_cuda.c").read_text()
    launcher = "".join((NVIDIA / name).read_text() for name in ("driver.c", "driver.py"))
    named = set(re.findall(r"\b(cu[A-Z]\w+)\(", launcher)) - set(re.findall(r"\b(cu\w+)\(", source))
    (folder / "others.c").write_text("".join(f"int {name}() {{ return 999; }}\n" for name in sorted(named)))
    command = [COMPILER, "-shared", "-fPIC", "-w", "-I", NVIDIA / "include", "-Wl,-soname,libcuda.so.1"]
    command += [HERE / "recording_cuda.c", folder / "others.c", "-o", folder / "libcuda.so.1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def launches(libcuda: Path, tmp_path_factory) -> dict[str, object]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTLOCK_CUBINS")
    }
    work = tmp_path_factory.mktemp("launched")
    environment |= {"LD_LIBRARY_PATH": str(libcuda), "TRITON_LIBCUDA_PATH": str(libcuda)}
    environment |= {"TRITON_CACHE_DIR": str(work / "cache")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the same fastlock as here
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time.launched_twice", str(work / "cubins")]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_fastlock_launches_what_triton_launches(launches) -> None:
    ours, theirs = launches["ours"], launches["theirs"]
    assert (ours.pop("launches"), theirs.pop("launches")) == (1, 2)
    assert ours == theirs
    assert ours["grid"] == [128, 2, 1]
    assert ours["block"] == [256, 1, 1]
    assert ours["shared"] > 0
    assert all(ours["parameters"][:4])
    assert ours["parameters"][4:] == [0, 0]
    assert ours["attributes"] == 0


def test_a_planned_launch_is_one_launch_of_the_driver_and_keeps_nothing(launches) -> None:
    """How long it takes is reported by `bench/run.py --only host`; here only printed."""
    again = launches["again"]
    print(f"{again['microseconds']:.2f} µs a launch")
    assert again["launches"] == LAUNCHES
    assert again["kept"] < LAUNCHES / 10  # blocks of memory: far fewer than one a launch
