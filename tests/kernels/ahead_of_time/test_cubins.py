"""Launching cubins, against a fake driver that checks what arrives and computes the fold from it."""

import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import fastlock
from fastlock import fold as fold_module
from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import cubins, manifest
from fastlock.kernels.ahead_of_time.launch_paths import launch_paths
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import variants
from tests.helpers import fake_driver
from tests.helpers.fake_driver import FakeDriver, describe, write_folder
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.kernels.fold.sites import arguments, make_site

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake driver reads the CPU's memory")

BF16_ROWS = fake_driver.BY_NAME["bfloat16-rows-64-aligned"]
EVERY = list(fake_driver.BY_NAME.values())
ALIGNED = [variant for variant in EVERY if variant.aligned]


@pytest.fixture
def library() -> FakeDriver:
    library = FakeDriver()
    library.stack.append(fake_driver.context_of(0))
    return library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "cubins", [describe(variant) for variant in ALIGNED])
    return tmp_path / "cubins"


@pytest.fixture
def installed(monkeypatch, folder, library) -> FakeDriver:
    fake_driver.install(monkeypatch, folder, library)
    yield library
    cubins.LOADER.forget()
    KEPT.clear()
    assert library.broken == []


KEPT: list[object] = []


def table_of(*sites) -> fold.Table:
    KEPT.append(sites)  # a table holds addresses only
    return fold.build_table(*arguments(sites))


def is_jit(table: fold.Table) -> bool:
    return isinstance(table.run, partial) and table.run.func is fold._launch_jit


def fold16(site) -> torch.Tensor:
    """The result in the weight's own dtype: only the interpreter needs float32."""
    site = dataclasses.replace(site, guarded=site.guarded.to(site.weight.dtype))
    fold.fold_sites(*arguments([site]))
    return site.out


def exact(site) -> torch.Tensor:
    head_dim, weight = site.values.shape[1], site.weight.double()
    total = torch.zeros(weight.shape[0], dtype=torch.float64) if site.bias is None else site.bias.double()
    for head, d in zip(site.heads, site.values.float().double(), strict=True):
        total = total + weight[:, head * head_dim : (head + 1) * head_dim] @ d
    return total.to(site.weight.dtype)


@pytest.mark.parametrize("variant", ALIGNED, ids=lambda variant: variant.name)
def test_every_argument_of_a_launch(variant: variants.Variant, installed: FakeDriver) -> None:
    """Number, order and values of the parameters, grid, block, shared memory, stream, context; and what comes out."""
    site = make_site(1000, variant.head_dim, (0, 2), variant.dtype, variant.transposed)
    site = dataclasses.replace(site, guarded=site.guarded.to(variant.dtype))
    table = table_of(
        site,
        dataclasses.replace(
            make_site(72, variant.head_dim, (1,), variant.dtype, variant.transposed),
            guarded=torch.zeros(72 + 80, dtype=variant.dtype),
        ),
    )
    fold.launch(table)
    (launch,) = installed.launches
    addresses = tuple(part.data_ptr() for part in (table.sites, table.heads, table.values, table.flags))
    assert launch == fake_driver.Launch(
        variant=variant.name,
        grid=(2, -(-1000 // 32), 1),
        block=(max(128, 2 * variant.block_columns), 1, 1),
        shared=1024,
        stream=fake_driver.STREAM,
        parameters=(*addresses, 0, 0),
        context=fake_driver.context_of(0),
        extra=None,
    )
    assert torch.equal(site.out, exact(site))


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_scratch_addresses_are_null_however_many(count: int, installed: FakeDriver, folder: Path) -> None:
    """Triton 3.4 and earlier have one, 3.6 two; the manifest says how many."""
    installed.parameters = [(8 * i, 8) for i in range(count)]
    write_folder(folder, [describe(BF16_ROWS, parameters=tuple(installed.parameters))])
    fold16(make_site(40, 64, (0,)))
    assert len(installed.launches[0].parameters) == count
    assert installed.launches[0].parameters[4:] == (0,) * (count - 4)


def test_a_table_is_packed_once_and_launched_often(installed: FakeDriver) -> None:
    site = make_site(40, 64, (0, 2), torch.float32)
    table = table_of(site)
    made = list(installed.calls)
    for _ in range(3):
        fold.launch(table)
    assert installed.calls[len(made) :] == ["cuCtxGetCurrent", "cuLaunchKernel"] * 3
    assert installed.launches[0] == installed.launches[2]
    site.weight[:, :64] *= 2
    fold.launch(table)
    assert torch.equal(site.out, exact(site))


def test_the_stream_is_that_of_the_moment(installed: FakeDriver, monkeypatch) -> None:
    table = table_of(make_site(40, 64, (0,), torch.float32))
    for stream in (0, 2**47 + 16):
        monkeypatch.setattr(cubins, "current_stream", lambda device, stream=stream: stream)
        fold.launch(table)
    assert [launch.stream for launch in installed.launches] == [0, 2**47 + 16]


def test_a_module_is_loaded_once_a_device_and_variant(installed: FakeDriver) -> None:
    for _ in range(3):
        fold16(make_site(40, 64, (0,)))
    fold16(make_site(40, 64, (0,), torch.float16))
    assert installed.calls.count("cuModuleLoadData") == 2
    assert sorted(installed.modules.values()) == [b"bfloat16-rows-64-aligned", b"float16-rows-64-aligned"]


def test_other_threads_and_other_devices_contexts(installed: FakeDriver) -> None:
    """A thread without a context, or with another device's, launches in the weights' device's, and keeps its own."""
    table = table_of(make_site(40, 64, (0,), torch.float32))
    left: list[list[int]] = []

    def launch(contexts: list[int]) -> None:
        installed.stack.extend(contexts)
        fold.launch(table)
        left.append(list(installed.stack))

    for contexts in ([], [fake_driver.context_of(1)]):
        thread = threading.Thread(target=launch, args=[contexts])
        thread.start()
        thread.join()
    assert left == [[], [fake_driver.context_of(1)]]
    assert [launch.context for launch in installed.launches] == [fake_driver.context_of(0)] * 2


def test_threads_that_start_together_load_one_module(installed: FakeDriver) -> None:
    start, kernels = threading.Barrier(8), []

    def choose() -> None:
        start.wait()
        kernels.append(cubins.LOADER.choose(BF16_ROWS.name, 0).kernel)

    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, kernels))) == 1
    assert installed.calls.count("cuModuleLoadData") == 1


def test_each_device_has_its_own_module(monkeypatch, folder: Path) -> None:
    library = FakeDriver(capabilities=((9, 0), (9, 0), (7, 5)))
    fake_driver.install(monkeypatch, folder, library)
    kernels = [cubins.LOADER.choose(BF16_ROWS.name, index).kernel for index in (0, 1)]
    assert [kernel.context for kernel in kernels] == [fake_driver.context_of(0), fake_driver.context_of(1)]
    assert kernels[0].function != kernels[1].function
    assert cubins.LOADER.choose(BF16_ROWS.name, 2).reason == "no cubin runs on compute capability 7.5, only on sm_90a"
    assert cubins.LOADER.choose(BF16_ROWS.name, 3).kernel is None
    monkeypatch.setattr(fold, "_cuda_index", lambda device: 1)
    fold.launch(table_of(make_site(40, 64, (0,), torch.float32)))
    assert (library.launches[0].stream, library.launches[0].context) == (
        fake_driver.STREAM + 1,
        fake_driver.context_of(1),
    )


def test_relock_by_a_cubin(installed: FakeDriver, monkeypatch) -> None:
    """A whole model: one launch, the biases that its weights give, and nothing left after unlocking."""
    monkeypatch.setattr(fold_module, "_way", lambda f: fold_module._ByKernel)
    model = tiny_model("llama", torch.bfloat16, head_dim=64)
    lock, before = random_lock(model, [(0, 1), (0, 3), (1, 2), (2, 0)]), state(model)
    fastlock.relock(model, lock, 2.0)
    assert [launch.grid[0] for launch in installed.launches] == [3]
    assert fastlock.verify(model, lock)
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_a_plan_launches_the_same_cubin_with_the_same_arguments(installed: FakeDriver, monkeypatch) -> None:
    """Another strength too: the displacements are replaced where they are."""
    monkeypatch.setattr(fold_module, "_way", lambda f: fold_module._ByKernel)
    model = tiny_model("llama", torch.bfloat16, head_dim=64)
    lock = random_lock(model, [(0, 1), (2, 0)])
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    made = len(installed.calls)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(3)
    plan.relock()
    assert installed.calls[made:] == ["cuCtxGetCurrent", "cuLaunchKernel"]
    plan.relock(strength=4.0)
    assert installed.launches[0] == installed.launches[1] == installed.launches[2]
    assert fastlock.verify(model, lock).strength == 4.0
    installed.fails["cuLaunchKernel"] = 1
    with pytest.raises(FastlockError, match="not launched"):
        plan.relock()
    assert fastlock.verify(model, lock).strength == 4.0


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


def change_manifest(**changes: object):
    def change(folder: Path, library: FakeDriver, monkeypatch) -> None:
        data = json.loads((folder / manifest.MANIFEST).read_text())
        for key, value in changes.items():
            if key in data:
                data[key] = value
            else:
                for cubin in data["cubins"]:
                    cubin[key] = value
        (folder / manifest.MANIFEST).write_text(json.dumps(data))

    return change


def write(name: str, text: str):
    return lambda folder, library, monkeypatch: (folder / name).write_text(text)


def remove(name: str):
    return lambda folder, library, monkeypatch: (folder / name).unlink()


def set_library(**changes: object):
    return lambda folder, library, monkeypatch: [setattr(library, key, value) for key, value in changes.items()]


def no_library(folder: Path, library: FakeDriver, monkeypatch) -> None:
    def open_library() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("fastlock.kernels.ahead_of_time.driver.open_library", open_library)


def other_sources(folder: Path, library: FakeDriver, monkeypatch) -> None:
    """The kernel is edited after the cubins were built."""
    here = Path(cubins.__file__).parents[1]
    changed = folder.parent / "sources"
    for name in manifest.SOURCES:
        (changed / name).parent.mkdir(parents=True, exist_ok=True)
        (changed / name).write_bytes((here / name).read_bytes() + b"\n" * (name == "fold/triton_kernel.py"))
    digest = manifest.digest_of_sources(changed)
    monkeypatch.setattr(cubins, "digest_of_sources", lambda folder=None: digest)


FILE = "bfloat16-rows-64-aligned-sm_90a.cubin"
LOADING = ("cuDeviceGet", "cuDeviceGetAttribute", "cuDriverGetVersion", "cuDevicePrimaryCtxRetain", "cuModuleLoadData")
LOADING += ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuModuleGetFunction", "cuFuncGetAttribute")
LOADING += ("cuFuncGetParamInfo",)


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
        (change_manifest(variant="other"), "there is no cubin of bfloat16-rows-64-aligned"),
        (change_manifest(cubins=[]), "there is no cubin of bfloat16-rows-64-aligned"),
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
        "no cubin of bfloat16-float32-rows-64-plain" in cubins.LOADER.choose("bfloat16-float32-rows-64-plain", 0).reason
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


@pytest.mark.parametrize("name", ["cuCtxGetCurrent", "cuLaunchKernel"])
def test_a_refused_launch_is_an_error(name: str, installed: FakeDriver) -> None:
    table = table_of(make_site(40, 64, (0,), torch.float32))
    installed.fails = {name: 209}
    with pytest.raises(FastlockError, match=rf"{name}: CUDA_ERROR_NO_BINARY_FOR_GPU .*\(209\)"):
        fold.launch(table)
    assert installed.launches == []
    installed.fails = {}
    fold.launch(table)


def test_the_message_of_a_refused_launch_says_what_to_do(installed: FakeDriver) -> None:
    table = table_of(make_site(40, 64, (0,), torch.float32))
    installed.fails = {"cuLaunchKernel": 1}
    with pytest.raises(FastlockError, match=r"was not launched, or an earlier kernel failed.*FASTLOCK_CUBINS=0"):
        fold.launch(table)


def test_addresses_must_be_aligned(installed: FakeDriver) -> None:
    kernel = cubins.LOADER.choose(BF16_ROWS.name, 0).kernel
    for addresses in ([16, 32, 48], [16, 32, 48, 56], [16, 32, 48, 64, 80]):
        with pytest.raises(FastlockError, match="4 addresses, multiples of 16"):
            kernel.launcher((1, 1, 1), addresses)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_forgets_what_was_loaded(installed: FakeDriver) -> None:
    table = table_of(make_site(40, 64, (0,), torch.float32))
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def child() -> None:
        try:
            fold.launch(table)
            theirs.send("launched")
        except FastlockError as error:
            theirs.send((str(error), len(cubins.LOADER._choices), len(installed.launches)))
        theirs.send(cubins.LOADER.choose(BF16_ROWS.name, 0).reason)  # the lock is its own, and free

    process = multiprocessing.get_context("fork").Process(target=child)
    with cubins.LOADER._lock:  # as if another thread held it
        process.start()
    assert ours.poll(60)
    message, choices, launches = ours.recv()
    chose = ours.poll(10)
    process.kill()
    process.join()
    assert chose, "the child waits for a lock that nobody will release"
    assert "forked" in message
    assert (choices, launches) == (0, 0)
    assert cubins.LOADER._choices, "the parent keeps its own"
    fold.launch(table)


NO_TRITON = """
import pathlib, sys
import pytest, torch
import fastlock
from fastlock import fold as fold_module
from tests.helpers import fake_driver
from fastlock.kernels.fold.reference import HeadColumns
library = fake_driver.FakeDriver()
weight, values = torch.randn(40, 256).bfloat16(), torch.randn(2, 64, dtype=torch.float64)
with pytest.MonkeyPatch.context() as patch:
    fake_driver.install(patch, pathlib.Path(sys.argv[1]), library)
    patch.setattr(fold_module, "_way", lambda f: fold_module._ByKernel)
    fold_module.fold([fold_module.Fold(HeadColumns.in_projection(weight, (0, 3), 64), values, None, "a site")])
assert len(library.launches) == 1
print([name for name in sys.modules if name.partition(".")[0] == "triton"])
"""


def test_no_triton_is_imported(folder: Path) -> None:
    """By fastlock. (transformers' models bring torch._dynamo, which imports it wherever it is installed.)"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the same fastlock as here
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", NO_TRITON, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


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


def test_neither_cubin_nor_triton_is_a_clear_error(installed: FakeDriver, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlock.kernels.fold.triton_kernel", None)
    monkeypatch.delattr("fastlock.kernels.fold.triton_kernel", raising=False)
    with pytest.raises(UnsupportedError, match="`fastlock doctor` says why"):
        fold.launch(table_of(make_site(40, 64, (0,), offset=1)))
