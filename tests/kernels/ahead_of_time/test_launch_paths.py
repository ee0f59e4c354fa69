"""What `fastlock doctor` says would fold on each device."""

from pathlib import Path

import pytest
import torch

from fastlock.kernels.ahead_of_time import manifest
from fastlock.kernels.ahead_of_time.launch_paths import launch_paths
from tests.helpers import fake_driver
from tests.helpers.fake_driver import FakeDriver
from tests.kernels.ahead_of_time.changes import FILE, change_manifest, no_library, remove, write
from tests.kernels.ahead_of_time.launching import ALIGNED

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake driver reads the CPU's memory")


@pytest.fixture
def devices(monkeypatch) -> None:
    """torch sees the fake driver's devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Fake {index}")


def test_doctor_names_the_path_and_why(devices, monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    library = FakeDriver(capabilities=((9, 0), (7, 5)))
    fake_driver.install(monkeypatch, folder, library)
    with_cubin, with_jit, cpu = launch_paths()
    assert (with_cubin.device, with_cubin.path) == ("cuda:0, Fake 0", "cubin")
    assert with_cubin.reason.startswith(f"{len(ALIGNED)} kernels, compiled ahead of time for sm_90a by ptxas 12.8")
    assert len(library.modules) == len(ALIGNED), "it tries them all"
    assert (with_jit.device, with_jit.path) == ("cuda:1, Fake 1", "jit")
    assert with_jit.reason.endswith("first launch: no cubin runs on compute capability 7.5, only on sm_90a")
    assert (cpu.device, cpu.path) == ("CPU", "reference")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [path.path for path in launch_paths()] == ["cubin", "none", "reference"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (write(FILE, "damaged"), f"first launch for 1 of {len(ALIGNED)} kernels: {FILE} is not the file"),
        (remove(manifest.MANIFEST), "first launch: this installation has no cubins"),
        (change_manifest(cubins=[]), "first launch: the manifest lists no cubin"),
        (no_library, "first launch: libcuda.so.1"),
    ],
)
def test_doctor_says_what_is_wrong(change, reason, devices, monkeypatch, folder, library) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fake_driver.install(monkeypatch, folder, library)
    change(folder, library, monkeypatch)
    path, _ = launch_paths()
    assert path.path == "jit"
    assert reason in path.reason
