"""Which cubin fits a device; and whatever does not is Triton's JIT, and a reason."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from fastlock.errors import DamagedError, UnsupportedError
from fastlock.kernels.ahead_of_time import cubins, manifest
from fastlock.kernels.fold import launch as fold
from tests.helpers import fake_driver
from tests.helpers.fake_driver import FakeDriver, describe, write_folder
from tests.kernels.ahead_of_time.changes import (
    FILE,
    LOADING,
    change_manifest,
    no_library,
    other_sources,
    remove,
    set_library,
    write,
)
from tests.kernels.ahead_of_time.launching import ALIGNED, BF16_ROWS, exact, is_jit, table_of
from tests.kernels.fold.sites import make_site

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake driver reads the CPU's memory")


@pytest.mark.parametrize(
    ("target", "capability", "integrated", "runs"),
    [
        ("sm_80", (8, 0), False, True),
        ("sm_80", (8, 6), False, True),
        ("sm_80", (8, 9), False, True),
        ("sm_86", (8, 0), False, False),  # not from a minor revision to an earlier one
        ("sm_80", (8, 7), True, False),  # Tegra
        ("sm_87", (8, 7), True, True),
        ("sm_80", (9, 0), False, False),  # not across major ones
        ("sm_80", (7, 5), False, False),
        ("sm_90", (9, 0), False, True),
        ("sm_90a", (9, 0), False, True),
        ("sm_90a", (9, 1), False, False),  # architecture-specific
        ("sm_100a", (10, 0), False, True),
        ("sm_100a", (10, 3), False, False),
        ("sm_100f", (10, 3), False, False),
        ("sm_100", (10, 3), False, True),
        ("sm_120a", (12, 0), False, True),
        ("sm_120a", (12, 1), False, False),
        ("sm_120", (1, 20), False, False),
        ("compute_90", (9, 0), False, False),
        ("sm_", (9, 0), False, False),
    ],
)
def test_where_a_cubin_runs(target: str, capability: tuple[int, int], integrated: bool, runs: bool) -> None:
    assert cubins.runs_on(target, capability, integrated) is runs


def test_of_several_the_nearest_is_taken(monkeypatch, folder: Path) -> None:
    write_folder(folder, [describe(BF16_ROWS, target) for target in ("sm_86", "sm_80", "sm_90a")])
    fake_driver.install(monkeypatch, folder, FakeDriver(capabilities=((8, 9), (8, 0))))
    assert [cubins.LOADER.choose(BF16_ROWS.name, index).kernel.cubin.target for index in (0, 1)] == ["sm_86", "sm_80"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove(manifest.MANIFEST), "this installation has no cubins"),
        (write(manifest.MANIFEST, "{"), "manifest of the cubins cannot be read"),
        (write(manifest.MANIFEST, "[]"), "manifest of the cubins cannot be read"),
        (change_manifest(format=2), "another format"),
        (change_manifest(sources=None), "must be text"),
        (change_manifest(sources="0" * 64), "built from other sources"),
        (other_sources, "built from other sources"),
        (change_manifest(file="../../secret"), "'../../secret' is described wrongly"),
        (change_manifest(shared=-1), "is described wrongly"),
        (change_manifest(shared="1024"), "is described wrongly"),
        (change_manifest(num_warps=64), "is described wrongly"),
        (change_manifest(num_warps=0), "is described wrongly"),
        (change_manifest(parameters=[[0, 8], [8, 8]]), "is described wrongly"),
        (change_manifest(parameters=[[0, 8], [8, 8], [16, 4], [24, 8], [32, 8], [40, 8]]), "is described wrongly"),
        (change_manifest(parameters=[[0, 8], [8, 8], [16]]), "cannot be read"),
        (change_manifest(ptxas="twelve"), "is described wrongly"),
        (change_manifest(colour="red"), "unexpected keyword argument 'colour'"),
        (change_manifest(target="sm_80"), "no cubin runs on compute capability 9.0, only on sm_80"),
        (change_manifest(variant="other"), f"there is no cubin of {BF16_ROWS.name}"),
        (change_manifest(cubins=[]), f"there is no cubin of {BF16_ROWS.name}"),
        (change_manifest(parameters=[[8 * i, 8] for i in range(5)]), "other parameters than the manifest says"),
        (change_manifest(kernel="other_kernel"), r"cuModuleGetFunction: .*\(500\)"),
        (change_manifest(ptxas="13.1"), "need a driver for CUDA 13, and this one is for CUDA 12.8"),
        (write(FILE, "damaged"), f"{FILE} is not the file that the manifest describes"),
        (remove(FILE), "No such file"),
        (no_library, "libcuda.so.1"),
        (set_library(capabilities=((9, 1),)), "no cubin runs on compute capability 9.1, only on sm_90a"),
        (set_library(capabilities=()), "cuDeviceGet"),
        (set_library(version=11080), "need a driver for CUDA 12, and this one is for CUDA 11.8"),
        (set_library(max_threads=64), "does not run with 4 warps"),
        (set_library(parameters=[(0, 8)] * 6), "other parameters than the manifest says"),
        *((set_library(fails={name: 209}), rf"{name}: CUDA_ERROR_NO_BINARY_FOR_GPU") for name in LOADING),
    ],
)
def test_what_does_not_fit_is_the_jit_and_a_reason(change, reason, folder, library, monkeypatch) -> None:
    """Never a wrong answer: the interpreter, which stands for the JIT here, folds it."""
    fake_driver.install(monkeypatch, folder, library)
    change(folder, library, monkeypatch)
    site = make_site(40, 64, (0, 2))
    table = table_of(site)
    assert is_jit(table)
    choice = cubins.LOADER.choose(BF16_ROWS.name, 0)
    assert choice.kernel is None
    assert re.search(reason, choice.reason), choice.reason
    fold.launch(table)
    assert torch.allclose(site.out.double(), exact(dataclasses.replace(site, guarded=site.guarded)).double(), rtol=0.01)
    assert library.launches == []
    assert library.stack == [fake_driver.context_of(0)] or "cuCtxP" in reason
    cubins.LOADER.forget()


def test_a_variant_that_is_not_shipped_is_the_jit(installed: FakeDriver) -> None:
    site = make_site(40, 64, (0,), offset=1)
    assert is_jit(table_of(site))
    assert (
        "no cubin of bfloat16-float32-rows-64-plain-serial"
        in cubins.LOADER.choose("bfloat16-float32-rows-64-plain-serial", 0).reason
    )


@pytest.mark.parametrize(("value", "used"), [("0", False), ("1", True), ("", True)])
def test_the_switch(value: str, used: bool, installed: FakeDriver, monkeypatch) -> None:
    monkeypatch.setenv(cubins.SWITCH, value)
    choice = cubins.LOADER.choose(BF16_ROWS.name, 0)
    assert (choice.kernel is not None) is used
    assert used or choice.reason == "FASTLOCK_CUBINS=0 is set"


def test_triton_interpreter_is_asked_for_by_its_own_variable(monkeypatch) -> None:
    for value, asked in {"1": True, "True": True, "on": True, "0": False, "": False}.items():
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert cubins.interpreting() is asked
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not cubins.interpreting()


def test_more_shared_memory_than_48_kib_is_asked_for(installed: FakeDriver, folder: Path) -> None:
    write_folder(folder, [describe(BF16_ROWS, shared=48 * 1024), describe(ALIGNED[0], shared=48 * 1024 + 1)])
    assert cubins.LOADER.choose(BF16_ROWS.name, 0).kernel
    assert installed.allowed_shared == {}
    kernel = cubins.LOADER.choose(ALIGNED[0].name, 0).kernel
    assert installed.allowed_shared == {kernel.function: 48 * 1024 + 1}
    installed.fails = {"cuFuncSetAttribute": 1}
    cubins.LOADER.forget()
    assert "cuFuncSetAttribute" in cubins.LOADER.choose(ALIGNED[0].name, 0).reason


def test_a_module_that_fails_a_check_is_unloaded(installed: FakeDriver) -> None:
    installed.max_threads = 1
    assert cubins.LOADER.choose(BF16_ROWS.name, 0).kernel is None
    assert installed.modules == {}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (remove(manifest.MANIFEST), UnsupportedError),
        (write(manifest.MANIFEST, "{"), DamagedError),
        (change_manifest(sources="0" * 64), DamagedError),
        (write(FILE, "damaged"), DamagedError),
        (set_library(capabilities=((7, 5),)), UnsupportedError),
        (set_library(version=11080), UnsupportedError),
    ],
)
def test_what_is_damaged_is_told_from_what_does_not_fit(change, kind, folder, library, monkeypatch) -> None:
    fake_driver.install(monkeypatch, folder, library)
    change(folder, library, monkeypatch)
    with pytest.raises(kind):
        cubins.LOADER._load(BF16_ROWS.name, 0)
    cubins.LOADER.forget()
