"""Plans whose folds go by the kernel, in Triton's interpreter: inference mode, interruptions, and graph capture."""

import gc

import pytest
import torch

pytest.importorskip("triton")

import fastlock
from fastlock import fold as fold_module
from fastlock.kernels.fold import launch as kernels
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.models.test_relocking import biases, expected_biases, same_biases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _by_kernel(monkeypatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(fold_module, "_way", lambda f: fold_module._ByKernel)


def assert_near(found: dict, want: dict) -> None:
    """As near as float32 sums of the interpreter are."""
    assert found.keys() == want.keys()
    for layer, bias in found.items():
        torch.testing.assert_close(bias, None if want[layer] is None else want[layer].detach(), rtol=1e-4, atol=1e-5)


def planned(kind: str = "llama"):
    model = tiny_model(kind).to(DEVICE)
    lock = random_lock(model, [(0, 1), (2, 0)])
    want = {strength: expected_biases(model, lock, strength) for strength in (2.0, 3.0)}
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    return plan, model, lock, want


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_a_table_made_in_inference_mode_can_be_written_outside_it(first: str) -> None:
    """Another lock's heads, and then another strength: the one makes a table, the other writes to it."""
    model = tiny_model("llama").to(DEVICE)
    lock, other = random_lock(model, [(0, 1), (2, 0)]), random_lock(model, [(0, 2), (2, 1)], seed=3)
    want = expected_biases(model, other, 3.0)
    plan = fastlock.Plan([model], lock, 2.0)
    with torch.inference_mode(first == "inside"):
        plan.relock()
    with torch.inference_mode():
        plan.relock(other, 2.0)
        plan.relock(strength=4.0)
        plan.relock()
    plan.relock(strength=3.0)
    assert_near(biases(model), want)
    assert fastlock.verify(model, other).strength == 3.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_interruption_while_the_device_folds_leaves_no_flag(kind: str, monkeypatch) -> None:
    """What was not finite in a run that nobody waited for is not said of the next one."""
    plan, model, lock, want = planned(kind)
    before = biases(model)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastlock.models.copies.Copies.take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.relock(strength=1e39)
    assert same_biases(biases(model), before)
    plan.relock(strength=3.0)
    assert_near(biases(model), want[3.0])
    assert fastlock.verify(model, lock).strength == 3.0


def test_interrupted_twice(monkeypatch) -> None:
    """While it waits, and while what was interrupted is settled: the next run settles it."""
    plan, model, lock, want = planned()

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fold_module._ByKernel, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.relock(strength=1e39)
    plan.relock(strength=3.0)
    assert_near(biases(model), want[3.0])
    assert fastlock.verify(model, lock).strength == 3.0


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_flags_are_kept_until_the_kernel_that_writes_them_has_run(monkeypatch) -> None:
    """Of a plan that is thrown away while its kernel runs: torch would hand their memory to others."""
    plan, *_ = planned()
    group = plan._built._plan._groups[0]
    waited = []

    class Stream:
        def synchronize(self) -> None:
            waited.append(group_flags[0])

    group_flags = group._flags
    group._stream = Stream()
    group.start()
    del plan, group
    gc.collect()
    assert len(waited) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_a_run_waits_for_the_stream_that_it_was_launched_on(monkeypatch) -> None:
    """Whatever stream is current by then; and a Stream is made only for another one."""
    plan, *_ = planned()
    fold_plan = plan._built._plan
    group = fold_plan._groups[0]
    waited, made = [], []

    class Stream:
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle
            made.append(handle)

        def synchronize(self) -> None:
            waited.append(self.cuda_stream)

    monkeypatch.setattr(group, "_cuda_index", 0)
    for at_start, at_finish in ((7, 7), (7, 8), (8, 7), (7, 7)):
        monkeypatch.setattr("fastlock.kernels.ahead_of_time.cubins.current_stream", lambda i, h=at_start: h)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda i, h=at_start: Stream(h))
        fold_plan.start()
        monkeypatch.setattr("fastlock.kernels.ahead_of_time.cubins.current_stream", lambda i, h=at_finish: h)
        fold_plan.finish()
    assert waited == [7, 7, 8, 7]
    assert made == [7, 8, 7]


@pytest.fixture
def capturing(monkeypatch) -> list[object]:
    """A CUDA graph is being captured on this thread's stream: whatever is launched, or waited for, is noted."""
    spoilt: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", spoilt.append)
    monkeypatch.setattr(torch.cuda, "synchronize", spoilt.append)
    monkeypatch.setattr(torch, "equal", lambda *tensors: spoilt.append(tensors))
    monkeypatch.setattr(torch, "cat", lambda *tensors, **_: spoilt.append(tensors))
    monkeypatch.setattr(fold_module, "launch", spoilt.append)
    monkeypatch.setattr(fold_module, "build_table", lambda *arguments: spoilt.append(arguments))
    monkeypatch.setattr(kernels.Table, "displace", lambda *arguments: spoilt.append(arguments))
    return spoilt


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that a graph is captured")
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_nothing_is_relocked_while_a_graph_is_captured(kind: str, request) -> None:
    """It is refused before anything is launched or waited for; and afterwards all is as before."""
    plan, model, lock, want = planned(kind)
    other = tiny_model(kind, seed=5).to(DEVICE)
    before, before_other = state(model), state(other)
    fold = fold_module.Fold(kernels.HeadColumns(torch.randn(8, 64), (0,)), torch.randn(1, 64).double(), None, "a site")
    other_heads = random_lock(tiny_model(kind), [(0, 2), (2, 2)], seed=4)
    spoilt = request.getfixturevalue("capturing")
    for call in (
        plan.relock,
        lambda: plan.relock(strength=3.0),
        lambda: plan.relock(other_heads),
        lambda: fastlock.Plan([other], lock).relock(),
        lambda: fastlock.relock(other, lock),
        lambda: fastlock.relock_many([other], lock),
        lambda: fastlock.unlock(model),
        lambda: fastlock.relocked(model, lock).__enter__(),
        lambda: fold_module.fold([fold]),
        plan._built._plan.run,
    ):
        with pytest.raises(fastlock.FastlockError, match="a CUDA graph is being captured"):
            call()
    assert spoilt == []
    request.getfixturevalue("monkeypatch").undo()
    assert same_state(state(model), before)
    assert same_state(state(other), before_other)
    plan.relock(strength=3.0)
    assert_near(biases(model), want[3.0])
