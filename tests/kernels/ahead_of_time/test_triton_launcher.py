"""What fastlock gives the driver, against what Triton's own launcher gives it for the same table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_gpu import libcuda as libcuda_file

LAUNCHES = 1000  # as launched_twice.py does it


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("libcuda")
    libcuda_file.build(folder)
    return folder


@pytest.fixture(scope="module")
def launches(libcuda: Path, tmp_path_factory) -> dict[str, object]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTLOCK_CUBINS")
    }
    work = tmp_path_factory.mktemp("launched")
    environment |= libcuda_file.environment(libcuda)
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
