"""What `fastlock doctor` says would fold on each device."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastlock.kernels.ahead_of_time import manifest
from fastlock.kernels.fold import variants
from fastlock.kernels.launch_paths import BY_JIT, launch_paths
from tests.helpers import fake_driver
from tests.helpers.fake_driver import FakeDriver, describe, write_folder
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
    assert [path.path for path in launch_paths()] == ["cubin", "reference", "reference"]
    assert launch_paths()[1].reason.endswith("Triton is not installed: plain PyTorch folds, in float64")


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


def doubled(real):
    """Let a fold be wrong, but for its flags."""

    def run(variant, addresses, grid):
        real(variant, addresses, grid)
        for _, hidden, *_, out in fake_driver.at(addresses[0], grid[1] * 8, torch.int64).view(-1, 8).tolist():
            fake_driver.at(out, hidden, variant.out_dtype).mul_(2)

    return run


@pytest.fixture
def one_device(devices, monkeypatch, folder: Path, library: FakeDriver) -> FakeDriver:
    """A device on which nothing was checked yet."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fake_driver.install(monkeypatch, folder, library, checked=True)
    return library


def test_doctor_runs_every_cubin_once_and_finds_them_right(one_device: FakeDriver) -> None:
    for _ in range(2):
        path, _ = launch_paths()
        assert (path.path, path.faults) == ("cubin", ())
        assert path.to_dict()["faults"] == ()
    tried = [launch.variant for launch in one_device.launches]
    known = {variant.name for variant in variants.variants()}
    assert sorted(tried) == sorted(variant.name for variant in ALIGNED if variant.name in known)


@pytest.mark.parametrize("jit", ["right", "wrong", "missing"])
def test_doctor_says_which_kernels_are_wrong(jit: str, one_device: FakeDriver, monkeypatch, folder: Path) -> None:
    """And what folds instead; as data, and without a warning beside it."""
    write_folder(folder, [describe(BY_JIT)])
    monkeypatch.setattr(fake_driver, "run_fold", doubled(fake_driver.run_fold))
    name = f"the kernel fold {BY_JIT.name} is not run by its "
    if jit == "missing":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "fastlock.kernels.fold.triton_kernel", None)
        monkeypatch.delattr("fastlock.kernels.fold.triton_kernel", raising=False)
    elif jit == "wrong":
        monkeypatch.setattr("fastlock.kernels.fold.triton_kernel.launch", lambda arguments, variant, grid: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the kernel")  # ours: older Tritons' interpreters have some of their own
        path, _ = launch_paths()
    assert path.path == ("jit" if jit == "right" else "reference")
    assert path.faults[0].startswith(f"{name}cubin on cuda:0: its result was wrong: row 0 of 64 is ")
    assert [fault.startswith(f"{name}jit on cuda:0: ") for fault in path.faults[1:]] == [True] * (jit != "right")
    if jit == "right":
        assert path.reason.endswith("first launch: they do not fold as they should")
    else:
        told = "Triton is not installed" if jit == "missing" else "Triton's kernel is not used either"
        assert path.reason.endswith(f"they do not fold as they should; and {told}: plain PyTorch folds, in float64")


def test_doctor_says_what_could_not_be_tried(one_device: FakeDriver, monkeypatch, folder: Path) -> None:
    write_folder(folder, [describe(BY_JIT)])

    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastlock.kernels.launch_paths.build_table", fails)
    path, _ = launch_paths()
    assert path.path == "cubin"
    assert path.faults == (f"the kernel fold {BY_JIT.name} could not be tried: OutOfMemoryError: CUDA out of memory",)


def test_some_kernels_without_triton(one_device: FakeDriver, monkeypatch, folder: Path) -> None:
    write(FILE, "damaged")(folder, one_device, monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path, _ = launch_paths()
    assert (path.path, path.faults) == ("cubin", ())
    assert f"{len(ALIGNED) - 1} of {len(ALIGNED)} kernels load" in path.reason
    assert path.reason.endswith("Triton is not installed: plain PyTorch folds the rest, in float64")
