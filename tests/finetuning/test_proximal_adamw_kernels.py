"""ProximalAdamW by its kernels, on a GPU or in Triton's interpreter; the plain step is the truth."""

import math
import warnings
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import fastlock
from fastlock.errors import FastlockError, UnsupportedError
from fastlock.finetuning.step_runner import StepRunner
from fastlock.kernels.ahead_of_time.ways import NoWayError
from fastlock.kernels.proximal_step import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 63, 0, 1000, 3000)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """What is on the CPU has kernels, too: those of Triton's interpreter."""
    monkeypatch.setattr(launch, "has_kernels", lambda device: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def anew(monkeypatch):
    """How often everything was looked at: the length of this list."""
    calls = []
    run = StepRunner.run
    monkeypatch.setattr(StepRunner, "run", lambda self, *arguments: calls.append(run(self, *arguments)) or calls[-1])
    return calls


class Pair:
    """The same parameters twice: stepped by kernels, and in plain PyTorch."""

    def __init__(self, monkeypatch, sizes=SIZES, dtype=torch.float32, **settings):
        self.monkeypatch = monkeypatch
        self.ours = [nn.Parameter(torch.randn(size).to(DEVICE, dtype)) for size in sizes]
        self.theirs = [nn.Parameter(p.detach().clone()) for p in self.ours]
        self.optimizers = [fastlock.ProximalAdamW(params, **settings) for params in (self.ours, self.theirs)]
        self.tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}

    def both(self, what):
        """Do something to both optimizers."""
        for optimizer, params in zip(self.optimizers, (self.ours, self.theirs), strict=True):
            what(optimizer, params)

    def step(self, skip=(), scale=1.0, **scaled):
        """One step of each, by the same random gradients; they agree afterwards."""
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            p.grad = None if i in skip else torch.randn(p.shape).to(p) * scale
            q.grad = None if i in skip else p.grad.clone()
        for name, value in scaled.items():
            self.both(
                lambda optimizer, _, name=name, value=value: setattr(
                    optimizer, name, torch.tensor(value, device=DEVICE)
                )
            )
        ours, theirs = self.optimizers
        ours.step()
        with self.monkeypatch.context() as patch:
            patch.setattr(launch, "has_kernels", lambda device: False)
            theirs.step()
        self.both(lambda optimizer, _: [delattr(optimizer, name) for name in scaled])
        for p, q in zip(self.ours, self.theirs, strict=True):
            assert torch.allclose(p, q, **self.tolerance), (p - q).abs().max()
            for name, value in self.optimizers[1].state[q].items():
                assert torch.allclose(self.optimizers[0].state[p][name], value, **self.tolerance), name
            assert self.optimizers[0].state[p].keys() == self.optimizers[1].state[q].keys()

    def tables(self):
        return list(self.optimizers[0]._runner._tables.values())


def anchored(optimizer, _params):
    optimizer.anchor()


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": torch.bfloat16, "anchor_decay": 0.3}),
        (torch.bfloat16, {"state_dtype": torch.float32, "anchor_dtype": torch.float32}),
        (torch.bfloat16, {"state_dtype": torch.float32, "stochastic_rounding": True, "seed": 9}),
        (torch.float32, {"max_grad_norm": 0.7}),
    ],
)
def test_it_agrees_with_the_plain_step(monkeypatch, anew, dtype, settings) -> None:
    pair = Pair(monkeypatch, dtype=dtype, lr=0.01, pull=0.6, **settings)
    if settings.get("state_dtype") or dtype == torch.bfloat16:
        pair.tolerance["atol"] = 1e-2  # where a number lies between two, either may come out
    for step in range(5):
        if step == 2:
            pair.both(anchored)
        pair.step()
    # Ours looked twice, before and after the anchor was taken; theirs each time.
    assert anew == [True, False, False, True, False, False, False][: len(anew)]
    assert anew.count(True) == 2
    assert {table.variant.anchor is None for table in pair.tables()} == {True, False}


def test_what_changed_is_noticed(monkeypatch, anew) -> None:
    """Each change is followed by a step that agrees with the plain one."""
    pair = Pair(monkeypatch, lr=0.01)
    pair.both(anchored)
    looked = []

    def check(change=None, **step):
        if change is not None:
            pair.both(change)
        before = anew.count(True)
        pair.step(**step)
        looked.append(anew.count(True) - before)

    check()
    check()
    check(lambda optimizer, _: optimizer.param_groups[0].update(lr=0.2, weight_decay=0.3, betas=(0.5, 0.9)))
    check(lambda optimizer, _: optimizer.param_groups[0].update(pull=0.1))
    check(skip=(3,))
    check()  # the third is one step behind the others
    check(anchored)  # where it was
    assert looked == [1, 0, 0, 0, 0, 0, 0]
    looked.clear()
    check(lambda optimizer, _: optimizer.param_groups[0].update(pull=0.0))
    check(lambda optimizer, _: optimizer.param_groups[0].update(pull=0.5))
    check(lambda optimizer, _: optimizer.load_state_dict(optimizer.state_dict()))
    check(lambda optimizer, p: optimizer.state[p[3]].update(exp_avg=optimizer.state[p[3]]["exp_avg"] + 1))
    check(lambda _, p: setattr(p[4], "data", p[4].data + 0.25))
    check(lambda optimizer, p: optimizer.state[p[1]].update(step=torch.tensor(40.0)))

    def add(optimizer, params):
        params.append(nn.Parameter(torch.full((70,), 0.5, device=DEVICE)))
        optimizer.add_param_group({"params": params[-1:], "pull": 0.0, "lr": 0.5})

    check(add)
    assert looked == [1] * 7
    check()
    assert looked[-1] == 0


def test_only_addresses_that_moved_are_sent_again(monkeypatch) -> None:
    pair = Pair(monkeypatch, sizes=[8] * 40)
    pair.step()
    (table,) = pair.tables()
    everything = table.sent
    pair.step()
    of_gradients = table.sent
    for p in pair.ours:
        p.grad.zero_()
    pair.optimizers[0].step()
    assert table.sent == of_gradients - 40 * 8 < of_gradients == everything - 40 * 64


def test_gradients_are_freed_when_their_user_lets_go_of_them(monkeypatch) -> None:
    pair = Pair(monkeypatch)
    pair.both(anchored)
    for _ in range(3):
        pair.step()
        gradients = [weakref.ref(p.grad) for p in pair.ours]
        pair.optimizers[0].zero_grad()
        assert [of_one() for of_one in gradients] == [None] * len(SIZES)


def test_each_combination_of_dtypes_is_one_launch(monkeypatch) -> None:
    """And what has no kernel is stepped beside them."""
    params = [
        nn.Parameter(torch.randn(50).to(DEVICE, dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16)
    ]
    truth = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = fastlock.ProximalAdamW(params, max_grad_norm=2.0)
    plain = fastlock.ProximalAdamW(truth, max_grad_norm=2.0)
    for one in (optimizer, plain):
        one.anchor()
    launched = []
    monkeypatch.setattr(launch.StepTable, "step", _noted(launch.StepTable.step, launched))
    for _ in range(2):
        for p, q in zip(params, truth, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        launched.clear()
        optimizer.step()
        own = [table for table in launched if table in optimizer._runner._tables.values()]  # not one that is tried out
        assert [len(table._lengths) for table in own] == [2, 2]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "has_kernels", lambda device: False)
            plain.step()
        for p, q in zip(params, truth, strict=True):
            assert torch.allclose(p, q, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-2 if p.itemsize == 2 else 1e-6)


def _noted(method, seen):
    def noted(self):
        seen.append(self)
        return method(self)

    return noted


@pytest.mark.parametrize("clipped", [None, 1.0])
def test_a_scalers_numbers_are_used_on_the_device(monkeypatch, clipped) -> None:
    pair = Pair(monkeypatch, max_grad_norm=clipped)
    pair.both(anchored)
    pair.step(scale=512.0, grad_scale=512.0, found_inf=0.0)
    pair.step(scale=512.0, grad_scale=512.0, found_inf=0.0)
    before = [p.detach().clone() for p in pair.ours]
    pair.step(scale=math.inf, grad_scale=512.0, found_inf=1.0)
    assert all(torch.equal(p, q) for p, q in zip(pair.ours, before, strict=True))
    assert {pair.optimizers[0].state_dict()["state"][i]["step"].item() for i in (0, 1, 3, 4)} == {2.0}
    pair.step(scale=256.0, grad_scale=256.0, found_inf=0.0)
    assert {pair.optimizers[0].state_dict()["state"][i]["step"].item() for i in (0, 1, 3, 4)} == {3.0}


def test_saved_counts_are_not_those_of_the_step_that_follows(monkeypatch, tmp_path) -> None:
    """They lie in one tensor while the kernels run; what was saved, copied or loaded has its own."""
    pair = Pair(monkeypatch)
    pair.step()
    torch.save(pair.optimizers[0].state_dict(), tmp_path / "optimizer.pt")
    pair.step()
    assert (tmp_path / "optimizer.pt").stat().st_size < 2**16
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert {saved["state"][i]["step"].item() for i in (0, 1, 3, 4)} == {1.0}
    other = fastlock.ProximalAdamW([nn.Parameter(p.detach().clone()) for p in pair.ours])
    other.load_state_dict(pair.optimizers[0].state_dict())
    pair.step()
    assert {other.state[p]["step"].item() for p in other.param_groups[0]["params"]} == {2.0}


def test_a_kernel_that_is_not_right_here_is_gone_without(monkeypatch) -> None:
    """It says so once, and the step is the plain one."""

    def first(*_arguments):
        raise NoWayError("the kernel cannot be run here: it is broken.")

    monkeypatch.setattr(launch.WAYS, "first", first)
    pair = Pair(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"goes without its kernel: the kernel cannot be run here: it is broken\.$"):
        pair.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.step()
    assert not pair.tables()


def test_a_graph_is_not_captured(monkeypatch) -> None:
    pair = Pair(monkeypatch)
    pair.step()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = [p.detach().clone() for p in pair.ours]
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="CUDA graph"):
            pair.optimizers[0].step()
        pair.optimizers[0].load_state_dict(pair.optimizers[0].state_dict())  # so that it looks at everything
    assert all(torch.equal(p, q) for p, q in zip(pair.ours, before, strict=True))


def test_wrong_numbers_are_refused_before_anything_is_launched(monkeypatch) -> None:
    pair = Pair(monkeypatch)
    pair.step()
    pair.optimizers[0].param_groups[0]["pull"] = -1.0
    before = [p.detach().clone() for p in pair.ours]
    with pytest.raises(FastlockError, match="pull is -1.0"):
        pair.optimizers[0].step()
    pair.optimizers[0].param_groups[0]["pull"] = 1.0
    pair.ours[0].grad = torch.ones(1, device=DEVICE).to_sparse()
    with pytest.raises(UnsupportedError, match="sparse gradient"):
        pair.optimizers[0].step()
    assert all(torch.equal(p, q) for p, q in zip(pair.ours, before, strict=True))
