"""`relock` through the kernel: one launch for a whole model, and the biases that its own weights give."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastlock
from fastlock import fold as fold_module
from fastlock.kernels.fold import launch as kernels
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.sites import sites_for
from tests.helpers.families import random_lock, same_state, state, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many sites each launch folds. Without a GPU, what is dispatched to CUDA runs in the interpreter."""
    sites: list[int] = []

    def launch(table: kernels.Table, _launch=kernels.launch) -> None:
        sites.append(len(table.sites))
        _launch(table)

    monkeypatch.setattr(fold_module, "launch", launch)
    if DEVICE == "cpu":
        monkeypatch.setattr(fold_module, "_way", lambda f: fold_module._ByKernel)
    return sites


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_a_model_is_one_launch(kind: str, launches: list[int]) -> None:
    model = tiny_model(kind).to(DEVICE)
    lock, before = random_lock(model, [(0, 1), (0, 3), (1, 2), (2, 0)]), state(model)
    fastlock.relock(model, lock, 2.0)
    assert launches == [3]
    assert fastlock.verify(model, lock)
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_many_models_of_one_kind_are_one_launch(launches: list[int]) -> None:
    models = [tiny_model("llama", seed=seed).to(DEVICE) for seed in range(3)]
    lock = random_lock(models[0])
    fastlock.relock_many(models, lock)
    assert launches == [6]
    assert all(fastlock.verify(model, lock) for model in models)
    fastlock.relock_many([models[0], tiny_model("gpt_oss").to(DEVICE)], lock)
    assert launches == [6, 4]
    fastlock.relock_many([models[0], tiny_model("llama", torch.float16).to(DEVICE)], lock)
    assert launches[2:] == [2, 2], "one launch for each dtype"


def test_a_plan_is_one_launch_each_time(launches: list[int]) -> None:
    """Of models, and of bare projections; what they share is folded once; nothing else is launched."""
    models = [tiny_model("llama", seed=seed).to(DEVICE) for seed in range(2)]
    lock = random_lock(models[0], [(0, 1), (2, 0)])
    projections = {site.layer: site.weight.clone() for site in sites_for(models[0], lock)}
    plan = fastlock.Plan([*models, projections, dict(projections)], lock, 2.0)
    plan.relock()
    assert launches == [6]
    placed = [{layer: bias.data_ptr() for layer, bias in of_model.items()} for of_model in plan.biases]
    with torch.no_grad():
        models[1].model.layers[2].self_attn.o_proj.weight.mul_(-2)
    plan.relock()
    assert fastlock.verify(models[1], lock)
    plan.relock(strength=3.0)
    assert launches == [6, 6, 6]
    assert all(fastlock.verify(model, lock).strength == 3.0 for model in models)
    assert all(torch.equal(plan.biases[2][layer], bias) for layer, bias in plan.biases[0].items())
    assert placed == [{layer: bias.data_ptr() for layer, bias in of_model.items()} for of_model in plan.biases]
    plan.relock(random_lock(models[0], [(0, 2), (0, 3), (2, 1)], seed=5))
    assert launches == [6, 6, 6, 6]
    assert placed == [{layer: bias.data_ptr() for layer, bias in of_model.items()} for of_model in plan.biases]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fold_that_is_not_finite_leaves_the_biases(kind: str, launches: list[int]) -> None:
    model = tiny_model(kind).to(DEVICE)
    lock = random_lock(model, [(0, 1), (2, 0)])
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    before = [site.bias.clone() for site in sites_for(model, lock)]
    site = sites_for(model, lock)[1]
    kept = site.weight[1, 0].clone()
    site.weight[1, 0] = math.nan
    for _ in range(2):
        with pytest.raises(fastlock.FastlockError, match=f"^{site.name}: its fold is not finite"):
            plan.relock()
        assert all(torch.equal(s.bias, b) for s, b in zip(sites_for(model, lock), before, strict=True))
    site.weight[1, 0] = kept
    plan.relock()
    assert launches == [2, 2, 2, 2]
    assert fastlock.verify(model, lock)


@pytest.mark.parametrize("method", ["start", "finish"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_interrupted_relock_leaves_nothing(monkeypatch, kind: str, method: str, launches: list[int]) -> None:
    """Neither in the biases, nor in the displacements that the next one goes by, which are on the device already."""
    model = tiny_model(kind).to(DEVICE)
    lock, other = random_lock(model, [(0, 1), (2, 0)]), random_lock(model, [(0, 2), (2, 1)], seed=3)
    plan = fastlock.Plan([model], lock, 4.0)
    plan.relock()
    plan.relock(strength=2.0)
    before = [site.bias.clone() for site in sites_for(model, lock)]
    way, real = fold_module._ByKernel, getattr(fold_module._ByKernel, method)

    def interrupted(self):
        real(self)
        monkeypatch.setattr(way, method, real)
        raise KeyboardInterrupt

    for of, strength in ((None, 50.0), (other, 2.0)):
        monkeypatch.setattr(way, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.relock(of, strength)
        for _ in range(2):
            assert all(torch.equal(s.bias, b) for s, b in zip(sites_for(model, lock), before, strict=True))
            assert fastlock.verify(model, lock).strength == 2.0
            plan.relock()


@pytest.mark.parametrize("failing", [1, 2])
def test_out_of_memory_for_another_lock(monkeypatch, failing: int, launches: list[int]) -> None:
    """At its table, or at that of the earlier one, which is to be put back."""
    model = tiny_model("llama").to(DEVICE)
    lock, other = random_lock(model, [(0, 1), (2, 0)]), random_lock(model, [(0, 2), (2, 1)], seed=3)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    calls = []

    def build_table(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("out of memory")
        return kernels.build_table(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(fold_module, "build_table", build_table)
        with pytest.raises((torch.OutOfMemoryError, fastlock.FastlockError), match=r"out of memory|not finite"):
            plan.relock(other, 1e42)
    assert fastlock.verify(model, lock).strength == 2.0
    plan.relock()
    assert fastlock.verify(model, lock).strength == 2.0
    plan.relock(other, 3.0)
    assert fastlock.verify(model, other).strength == 3.0


def test_what_a_failed_launch_found_is_not_said_of_the_next_one(monkeypatch, launches: list[int]) -> None:
    models = [tiny_model("llama", seed=1).to(DEVICE), tiny_model("llama", torch.float16, seed=2).to(DEVICE)]
    lock = random_lock(models[0], [(0, 1)])
    plan = fastlock.Plan(models, lock, 2.0)
    plan.relock()
    weight = models[0].model.layers[0].self_attn.o_proj.weight
    kept = weight.detach().clone()
    real, calls = fold_module.launch, []

    def second_refused(table):
        calls.append(table)
        if len(calls) == 2:
            raise fastlock.FastlockError("cuLaunchKernel refused")
        real(table)

    with torch.no_grad():
        weight.fill_(math.nan)
    with monkeypatch.context() as patched:
        patched.setattr(fold_module, "launch", second_refused)
        with pytest.raises(fastlock.FastlockError, match="cuLaunchKernel refused"):
            plan.relock()
    with torch.no_grad():
        weight.copy_(kept)
    plan.relock()
    assert all(fastlock.verify(model, lock) for model in models)


def test_the_copy_of_what_was_placed_is_the_modules_own(launches: list[int]) -> None:
    """Two of them change places: unlock compares with the last one, and a bias that was trained is noticed."""
    model = tiny_model("llama").to(DEVICE)
    lock, before = random_lock(model, [(0, 1), (2, 0)]), state(model)
    plan = fastlock.Plan([model], lock)
    for strength in (1.0, 2.0, 3.0):
        plan.relock(strength=strength)
        for site in sites_for(model, lock):
            assert torch.equal(site.module.fastlock_placed_bias, site.bias)
            assert site.module.fastlock_placed_bias.data_ptr() != site.bias.data_ptr()
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_a_lock_of_other_heads_is_a_new_beginning(launches: list[int]) -> None:
    """Bare projections say nothing of head_dim: each lock has its own, and each launch one."""
    zoo = [{0: torch.randn(64, 256, device=DEVICE)} for _ in range(2)]

    def lock(head: int, head_dim: int) -> fastlock.Lock:
        direction = torch.randn(1, head_dim)
        rows = torch.tensor([0]), torch.tensor([head])
        return fastlock.Lock(*rows, direction / direction.norm(), torch.tensor([1.5]), head_dim=head_dim)

    first, wide, other = lock(1, 32), lock(1, 64), lock(2, 32)
    plan = fastlock.Plan(zoo, first, 2.0)
    for locks in ([first, first], [other, wide], [other, first], [wide, wide]):
        plan.relock(locks, 2.0)
        for projections, of_model, one in zip(zoo, plan.biases, locks, strict=True):
            d = one.displacement(2.0)[0].dense(256).double().to(DEVICE)
            torch.testing.assert_close(of_model[0], (projections[0].double() @ d).float(), rtol=1e-4, atol=1e-4)
    assert launches == [2, 1, 1, 2, 2]


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_the_interpreter_is_not_given_addresses_of_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "cuda_index", lambda device: 0)
    weight, out = torch.randn(4, 16), torch.full((4,), math.nan)
    with pytest.raises(fastlock.FastlockError, match="TRITON_INTERPRET is set"):
        kernels.fold_sites([HeadColumns(weight, (0,))], [torch.randn(1, 8)], [None], [out])
    assert out.isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_no_launch_by_triton_after_a_fork(monkeypatch) -> None:
    table = kernels.build_table([HeadColumns(torch.randn(4, 16), (0,))], [torch.randn(1, 8)], [None], [torch.empty(4)])
    monkeypatch.setattr(kernels, "cuda_index", lambda device: 0)
    monkeypatch.setattr(kernels.os, "getpid", lambda: -1)
    with pytest.raises(fastlock.FastlockError, match="was forked"):
        kernels.launch(table)


def test_biases_that_are_not_contiguous_are_read_as_they_are_now(launches: list[int]) -> None:
    weight, c = torch.randn(64, 128, device=DEVICE), torch.randn(128, device=DEVICE)
    lock = random_lock(tiny_model("llama"), [(1, 2)])
    plan = fastlock.Plan([{1: (weight, c[::2])}], lock)
    plan.relock()
    before = plan.biases[0][1].clone()
    c += 1
    plan.relock()
    torch.testing.assert_close(plan.biases[0][1], before + 1)
    assert launches == [1, 1]


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_gpu
def test_a_captured_graph_goes_on_with_the_new_bias() -> None:
    """A plan writes where the bias is: projections that were captured before add what was folded after.

    Not whole models: some transformers' attention masks cannot be captured.
    """
    model = tiny_model("llama", torch.bfloat16).to(DEVICE)
    lock = random_lock(model, [(0, 1), (2, 0)])
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    placed = [site.module for site in sites_for(model, lock)]
    x = torch.randn(5, 128, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                [projection(x) for projection in placed]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [projection(x) for projection in placed]
        before = [y.clone() for y in captured]
        for strength in (5.0, 0.0):
            plan.relock(strength=strength)
            graph.replay()
            torch.testing.assert_close(captured, [projection(x) for projection in placed])
            assert not any(torch.equal(y, old) for y, old in zip(captured, before, strict=True))


@needs_gpu
def test_two_streams_at_once() -> None:
    """Plans of their own, launched side by side, each on its thread's stream."""
    models = [tiny_model("llama", seed=seed).to(DEVICE) for seed in range(2)]
    lock = random_lock(models[0], [(0, 1), (2, 0)])
    plans = [fastlock.Plan([model], lock, 2.0) for model in models]
    torch.cuda.synchronize()

    def run(plan: fastlock.Plan) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for strength in (1.0, 2.0, 3.0) * 20:
                plan.relock(strength=strength)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, plans))
    assert all(fastlock.verify(model, lock).strength == 3.0 for model in models)


@needs_gpu
def test_models_on_the_cpu_and_on_the_gpu_in_one_call() -> None:
    models = [tiny_model("llama", torch.bfloat16, seed=1), tiny_model("llama", torch.bfloat16, seed=2).to(DEVICE)]
    lock = random_lock(models[0])
    plan = fastlock.Plan(models, lock)
    for strength in (1.0, 2.0):
        plan.relock(strength=strength)
        assert all(fastlock.verify(model, lock).strength == strength for model in models)
    models[1].cpu()
    plan.relock()
    assert all(fastlock.verify(model, lock).strength == 2.0 for model in models)
