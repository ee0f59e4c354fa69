"""What ProximalAdamW saves, loads and refuses, and what else it runs in."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import fastlock
from fastlock.errors import FastlockError, UnsupportedError
from tests.finetuning.fed_adamw import contents, copies, equal, fed, parameters, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit_in_its_own_dtypes(dtype, tmp_path) -> None:
    def optimizer_of(params):
        return fastlock.ProximalAdamW(
            params, pull=0.3, state_dtype=torch.float32, anchor_dtype=torch.float32, stochastic_rounding=rounding
        )

    rounding = dtype == torch.bfloat16
    ours = parameters(dtype)
    optimizer = optimizer_of(ours)
    optimizer.anchor()
    fed(copies(ours), ours)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = copies(ours)
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    before = contents(optimizer)
    assert {before[0, name].dtype for name in ("exp_avg", "anchor")} == {torch.float32}
    assert equal(contents(resumed), before)
    for _ in range(2):
        fed(again, ours)
        for p, q in zip(ours, again, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        resumed.step()
        assert same(ours, again)
    assert resumed.drift() == optimizer.drift() > 0


def test_what_else_is_in_a_state_keeps_its_dtype() -> None:
    """torch casts integers to the parameter's dtype, too."""
    ours = parameters(torch.bfloat16)
    optimizer = fastlock.ProximalAdamW(ours)
    optimizer.anchor()
    optimizer.state[ours[1]]["seen"] = torch.tensor([2**40 + 1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[ours[1]]["seen"].tolist() == [2**40 + 1]


def test_copies_and_pickles_go_on_by_themselves() -> None:
    ours = parameters()
    optimizer = fastlock.ProximalAdamW(ours)
    optimizer.anchor()
    fed(copies(ours), ours)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), _pickled(optimizer)):
        params = other.param_groups[0]["params"]
        assert same(params, ours)
        for p, q in zip(ours, params, strict=True):
            q.grad = p.grad.clone()
        other.step()
        assert not same(params, ours)
        assert other.drift() > optimizer.drift() > 0


def _pickled(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_an_adamws_state_goes_on() -> None:
    ours = parameters()
    theirs = copies(ours)
    adamw = torch.optim.AdamW(theirs, lr=0.02, foreach=False)
    fed(theirs, ours)
    adamw.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    optimizer = fastlock.ProximalAdamW(ours, pull=1.0)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))  # torch shares what it need not cast
    fed(theirs, ours)
    optimizer.step()
    adamw.step()
    assert same(ours, theirs)


def test_what_does_not_fit_is_not_loaded() -> None:
    ours = parameters()
    optimizer = fastlock.ProximalAdamW(ours)
    optimizer.anchor()
    fed(copies(ours), ours)
    optimizer.step()
    before = contents(optimizer)

    def refused(match, change, error=FastlockError):
        state = copy.deepcopy(optimizer.state_dict())
        change(state)
        with pytest.raises(error, match=match):
            optimizer.load_state_dict(state)
        assert equal(contents(optimizer), before)
        assert optimizer.param_groups[0]["pull"] == 1.0

    def without_anchor(state):
        for of_parameter in state["state"].values():
            del of_parameter["anchor"]

    def reshaped(state):
        state["state"][4]["anchor"] = torch.zeros(7185)

    refused(r"parameter 4 .*its anchor is \[7185\], not \[7186\]; this is another model's state", reshaped)
    refused("exp_avg", lambda state: state["state"][2].update(exp_avg=torch.zeros(62)))
    refused("an anchor was saved, and it was not loaded", without_anchor)
    refused("pull is -1", lambda state: state["param_groups"][0].update(pull=-1))
    refused("amsgrad", lambda state: state["param_groups"][0].update(amsgrad=True), UnsupportedError)
    refused("different number", lambda state: state["param_groups"].append({"params": []}), ValueError)


# What is refused, before anything moves.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pull": -0.1}, "pull is -0.1"),
        ({"pull": math.nan}, "pull is nan"),
        ({"pull": math.inf}, "pull is inf"),
        ({"pull": "1"}, "pull is '1'"),
        ({"anchor_decay": -1.0}, "anchor_decay is -1.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.tensor(math.nan)}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"betas": (0.9,)}, "give two numbers"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"state_dtype": torch.float16}, "state_dtype is torch.float16"),
        ({"anchor_dtype": torch.bfloat16}, "anchor_dtype is torch.bfloat16"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"stochastic_rounding": True}, "is for bfloat16 parameters"),
    ],
)
def test_wrong_arguments_are_refused(settings, message) -> None:
    with pytest.raises(FastlockError, match=message):
        fastlock.ProximalAdamW(parameters(), **settings)


def test_no_parameters_and_complex_ones_are_refused() -> None:
    with pytest.raises(FastlockError, match="there is no parameter"):
        fastlock.ProximalAdamW(iter([]))
    with pytest.raises(UnsupportedError, match=r"parameter 1 .* is complex.*view_as_real"):
        fastlock.ProximalAdamW([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = fastlock.ProximalAdamW(parameters())
    with pytest.raises(FastlockError, match="of all groups together"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "max_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 1


def test_what_was_frozen_when_the_anchor_was_taken_is_saved_and_loaded_without_one() -> None:
    ours = parameters()
    optimizer = fastlock.ProximalAdamW(ours)
    fed(copies(ours), ours)
    optimizer.step()
    ours[3].requires_grad_(False)
    optimizer.anchor()
    optimizer.load_state_dict(optimizer.state_dict())
    assert [i for i, p in enumerate(ours) if "anchor" not in optimizer.state[p]] == [3]
    with pytest.raises(FastlockError, match="parameter 3 .*unfrozen"):
        optimizer.step()
    ours[3].grad = None
    optimizer.step()


def test_groups_without_bfloat16_may_stand_beside_those_that_are_rounded() -> None:
    norm, weight = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = fastlock.ProximalAdamW([{"params": [norm]}, {"params": [weight]}], lr=0.1, stochastic_rounding=True)
    norm.grad, weight.grad = torch.ones(8), torch.ones(8, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.allclose(norm, torch.full((8,), 0.899), atol=1e-6)


def test_a_parameter_added_after_the_anchor_is_refused_before_anything_moves() -> None:
    ours = parameters()
    optimizer = fastlock.ProximalAdamW([("first", ours[1])], pull=1.0)
    optimizer.anchor()
    optimizer.add_param_group({"params": [("later", ours[2])]})
    fed(copies(ours), ours)
    weights = copies(ours)
    before = contents(optimizer)
    with pytest.raises(FastlockError, match=r"parameter later has no anchor.*Call anchor\(\)"):
        optimizer.step()
    assert same(ours, weights)
    assert equal(contents(optimizer), before)
    optimizer.param_groups[1]["pull"] = 0.0
    optimizer.step()
    optimizer.param_groups[1]["pull"] = 1.0
    optimizer.anchor()
    optimizer.step()
    assert not same(ours[1:3], weights[1:3])


def test_sparse_gradients_and_numbers_changed_later_are_refused_before_anything_moves() -> None:
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))]
    optimizer = fastlock.ProximalAdamW(ours)
    weights = copies(ours)
    ours[0].grad, ours[1].grad = torch.randn(4, 3), torch.randn(4, 3).to_sparse()
    with pytest.raises(UnsupportedError, match=r"parameter 1 .*sparse gradient.*sparse=False"):
        optimizer.step()
    ours[1].grad = torch.randn(4, 3)
    optimizer.param_groups[0]["pull"] = math.nan
    with pytest.raises(FastlockError, match="group 0: pull is nan"):
        optimizer.step()
    assert same(ours, weights)
    assert not optimizer.state


def test_compiled_loops_fall_back_to_it() -> None:
    """The model and the loss are compiled as far as they can be; the step runs as it is."""
    torch.manual_seed(1)
    results = []
    for compiled in (False, True):
        torch.manual_seed(2)
        model = nn.Linear(6, 3)
        optimizer = fastlock.ProximalAdamW(model.parameters(), lr=0.01, pull=0.5)
        optimizer.anchor()

        def train(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(train, backend="eager") if compiled else train
        for i in range(3):
            step(torch.full((2, 6), 0.1 * i))
        results.append([p.detach().clone() for p in model.parameters()])
    assert same(*results)


def test_what_accelerate_prepares_keeps_its_anchor(tmp_path) -> None:
    """It loads the optimizer's state, which torch would cast to the parameters' dtype."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(4, 3).bfloat16()
    optimizer = fastlock.ProximalAdamW(
        model.parameters(), pull=1.0, anchor_dtype=torch.float32, state_dtype=torch.float32
    )
    optimizer.anchor()
    optimizer.state[model.weight]["anchor"].add_(2.0**-20)  # which bfloat16 does not hold
    anchor = optimizer.state[model.weight]["anchor"].clone()
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    assert torch.equal(optimizer.state[model.weight]["anchor"], anchor)
    prepared(torch.ones(2, 4, dtype=torch.bfloat16)).square().mean().backward()
    wrapped.step()
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[model.weight]["anchor"], anchor)
    assert optimizer.drift() > 0
