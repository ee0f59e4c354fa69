"""Launching cubins, against a fake driver that checks what arrives and computes the fold from it."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastlock
from fastlock import fold as fold_module
from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import variants
from tests.helpers import fake_driver
from tests.helpers.fake_driver import FakeDriver, describe, write_folder
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.kernels.ahead_of_time.launching import ALIGNED, BF16_ROWS, exact, fold16, table_of
from tests.kernels.fold.sites import make_site

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake driver reads the CPU's memory")


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
        grid=(-(-1000 // 32), 2, 1),
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
    names = [dataclasses.replace(BF16_ROWS, dtype=d, out_dtype=d).name for d in (torch.bfloat16, torch.float16)]
    assert sorted(installed.modules.values()) == [name.encode() for name in names]


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
    monkeypatch.setattr(fold, "cuda_index", lambda device: 1)
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
    assert [launch.grid[1] for launch in installed.launches] == [3]
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


def test_neither_cubin_nor_triton_is_a_clear_error(installed: FakeDriver, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlock.kernels.fold.triton_kernel", None)
    monkeypatch.delattr("fastlock.kernels.fold.triton_kernel", raising=False)
    with pytest.raises(UnsupportedError, match="`fastlock doctor` says why"):
        fold.launch(table_of(make_site(40, 64, (0,), offset=1)))
