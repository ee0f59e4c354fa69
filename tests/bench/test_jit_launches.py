"""What a GPU would be given by Triton's JIT: kernels really compiled and launched, on a driver that does nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.lib.steps import environment_of
from tests.helpers.fake_gpu import libcuda, processes

# How many kernels of ours each way of the projection launches.
LAUNCHES = {"gather": 1, "shift": 1, "add": 1, "around": 2, "torch": 0}


def launched(place: Path) -> dict:
    """What jit_launches.py prints."""
    libcuda.build(place)
    processes.build(place)
    variables = os.environ | processes.environment(place) | libcuda.environment(place)
    command = [sys.executable, "-m", "tests.bench.jit_launches"]
    done = subprocess.run(command, env=environment_of(variables), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def check_a_kernel_that_writes_nothing_is_noticed_and_the_reference_folds(found) -> None:
    relocked = found["relocked"]
    assert relocked["launches"] == 1, "it is tried once"
    assert relocked["device"] == "cuda"
    assert relocked["verified"] == 2.0
    (warned,) = relocked["warned"]
    assert "is not run by its jit on cuda:0" in warned


def check_every_way_of_the_projection_is_compiled_and_launched(found) -> None:
    ways = found["locks_per_request"]
    assert {"gather", "add", "around"} <= set(ways)
    assert {kind: of_kind["launches"] for kind, of_kind in ways.items()} == {kind: LAUNCHES[kind] for kind in ways}
    assert all(of_kind["untouched"] for kind, of_kind in ways.items() if kind in ("gather", "shift"))


def check_a_binary_that_the_driver_refuses_is_noticed_and_the_reference_folds(found) -> None:
    refused = found["refused"]
    assert refused["launches"] == 0
    assert refused["verified"] == 2.0
    (warned,) = refused["warned"]
    assert "is not run by its jit on cuda:0" in warned


def test_what_the_jit_launches(tmp_path) -> None:
    """One test, as pytest-xdist would spread several over its processes, and compile everything in each."""
    found = launched(tmp_path)
    check_a_kernel_that_writes_nothing_is_noticed_and_the_reference_folds(found)
    check_every_way_of_the_projection_is_compiled_and_launched(found)
    check_a_binary_that_the_driver_refuses_is_noticed_and_the_reference_folds(found)
