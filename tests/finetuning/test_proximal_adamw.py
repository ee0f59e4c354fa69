"""ProximalAdamW on a CPU, against torch's own AdamW that is fed g + pull (w - anchor)."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import fastlock
from fastlock.errors import FastlockError, UnsupportedError

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = [(0,), (1,), (63,), (1000,), (7186,), (3, 5, 7)]


def parameters(dtype=torch.float32, sizes=SIZES):
    made = [nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    # A view into another tensor, at an odd address; and one whose columns are contiguous, not its rows.
    made += [nn.Parameter(torch.randn(66)[3:].to(dtype)), nn.Parameter(torch.randn(8, 6).to(dtype).t())]
    return made


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def fed(theirs, ours, anchor=None, pull=0.0, scale=1.0):
    """The same random gradients for both; to theirs, the term is added by hand."""
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        g = torch.randn(p.shape).to(p.dtype)
        p.grad = g * scale
        q.grad = g.clone() if anchor is None else g + pull * (q.detach() - anchor[i])


def same(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def contents(optimizer):
    """All tensors of a state, by parameter and name."""
    return {(i, k): v.clone() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6, "lr": 0.02}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taken", ["no anchor", "no pull"])
def test_without_a_pull_it_is_adamw_bit_for_bit(dtype, settings, taken) -> None:
    ours = parameters(dtype)
    theirs = copies(ours)
    pull = {"no anchor": 3.0, "no pull": 0.0}[taken]
    optimizer = fastlock.ProximalAdamW(ours, pull=pull, **settings)
    adamw = torch.optim.AdamW(theirs, foreach=False, **settings)
    if taken == "no pull":
        optimizer.anchor()
    for _ in range(5):
        fed(theirs, ours)
        optimizer.step()
        adamw.step()
        assert same(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        for name, value in adamw.state[q].items():
            assert torch.equal(optimizer.state[p][name], value)
            assert optimizer.state[p][name].dtype == value.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pull_is_added_to_the_gradient_bit_for_bit(dtype) -> None:
    """And the anchor moves only when it is taken anew."""
    ours = parameters(dtype)
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW(ours, lr=0.01, pull=0.7)
    adamw = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    anchor = None
    for step in range(9):
        if step in (2, 6):
            optimizer.anchor()
            anchor = [q.detach().clone() for q in theirs]
        fed(theirs, ours, anchor, 0.7)
        optimizer.step()
        adamw.step()
        assert same(ours, theirs)
        if anchor is not None:
            assert all(torch.equal(optimizer.state[p]["anchor"], a) for p, a in zip(ours, anchor, strict=True))


def test_each_group_has_settings_of_its_own() -> None:
    ours = parameters()
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW([{"params": ours[:3], "pull": 0.0, "lr": 0.1}, {"params": ours[3:]}], pull=0.5)
    adamw = torch.optim.AdamW([{"params": theirs[:3], "lr": 0.1}, {"params": theirs[3:]}], foreach=False)
    optimizer.anchor()
    anchor = [q.detach().clone() for q in theirs]
    for _ in range(4):
        fed(theirs, ours, anchor, 0.5)
        for p, q in zip(ours[:3], theirs[:3], strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        assert same(ours, theirs)


def test_the_loss_of_lisas_authors_has_the_same_gradients() -> None:
    """pull / 2 ||w - anchor||^2 in the loss, as they have it."""
    weight = nn.Parameter(torch.randn(200))
    start, x = weight.detach().clone() + 0.1, torch.randn(200)
    loss = (weight * x).sum().tanh() + 0.5 * 0.3 * (weight - start).norm() ** 2
    (theirs,) = torch.autograd.grad(loss, weight)
    optimizer = fastlock.ProximalAdamW([weight], lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0, pull=0.3)
    optimizer.anchor()
    optimizer.state[weight]["anchor"].copy_(start)
    (weight * x).sum().tanh().backward()
    optimizer.step()  # without a memory, the first moment is the gradient with the term
    assert (optimizer.state[weight]["exp_avg"] - theirs).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoupled_form_moves_beside_the_moments(dtype) -> None:
    ours = parameters(dtype)
    before = [p.detach().double() for p in ours]
    optimizer = fastlock.ProximalAdamW(ours, lr=0.1, weight_decay=0.0, pull=0.0, anchor_decay=0.4)
    optimizer.anchor()
    for p in ours:
        optimizer.state[p]["anchor"].add_(1.0)
        p.grad = torch.zeros_like(p)
    anchors = [optimizer.state[p]["anchor"].double() for p in ours]
    optimizer.step()
    for p, w, a in zip(ours, before, anchors, strict=True):
        assert not optimizer.state[p]["exp_avg"].any()
        expected = w - 0.1 * 0.4 * (w - a)
        assert torch.allclose(p.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_clipped_norm_has_the_term_in_it() -> None:
    """As torch clips what theirs is fed, over both groups."""
    ours = parameters()
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW([{"params": ours[:2]}, {"params": ours[2:]}], pull=2.0, max_grad_norm=0.5)
    adamw = torch.optim.AdamW(theirs, foreach=False)
    optimizer.anchor()
    anchor = [q.detach().clone() for q in theirs]
    for scale in (1.0, 1e-4):  # above the norm, and below it
        fed(theirs, ours, anchor, 2.0)
        for p, q, a in zip(ours, theirs, anchor, strict=True):
            p.grad *= scale
            q.grad = p.grad + 2.0 * (q.detach() - a)
        nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
        optimizer.step()
        adamw.step()
        assert same(ours, theirs)


def test_a_users_own_clipping_leaves_the_term_outside() -> None:
    ours = parameters()
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW(ours, pull=2.0)
    adamw = torch.optim.AdamW(theirs, foreach=False)
    optimizer.anchor()
    anchor = [q.detach() + 0 for q in theirs]
    for _ in range(3):
        fed(theirs, ours)
        nn.utils.clip_grad_norm_(ours, 0.5)
        nn.utils.clip_grad_norm_(theirs, 0.5)
        for q, a in zip(theirs, anchor, strict=True):
            q.grad += 2.0 * (q.detach() - a)
        optimizer.step()
        adamw.step()
        assert same(ours, theirs)


def test_drift_is_the_norm_of_what_has_moved() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = fastlock.ProximalAdamW(ours)
    with pytest.raises(FastlockError, match=r"Call anchor\(\) first"):
        optimizer.drift()
    optimizer.anchor()
    assert optimizer.drift() == 0
    before = torch.cat([p.detach().double().flatten() for p in ours])
    with torch.no_grad():
        for p in ours:
            p.add_(100 * torch.randn(p.shape))
    after = torch.cat([p.detach().double().flatten() for p in ours])
    assert optimizer.drift() == pytest.approx(float((after - before).norm()), rel=1e-6)
    assert optimizer.drift() ** 2 > torch.finfo(torch.float16).max


def test_partitions_and_permutations_give_the_same_bits() -> None:
    """As ZeRO has it, flat parts of all parameters; and any other order."""
    weights, anchors = torch.randn(7186), torch.randn(7186)
    grads = torch.randn(4, 7186)

    def trained(parts):
        params = [nn.Parameter(weights[part].clone()) for part in parts]
        optimizer = fastlock.ProximalAdamW(params, lr=0.01, pull=0.3, anchor_decay=0.2)
        optimizer.anchor()
        for p, part in zip(params, parts, strict=True):
            optimizer.state[p]["anchor"].copy_(anchors[part])
        for grad in grads:
            for p, part in zip(params, parts, strict=True):
                p.grad = grad[part].clone()
            optimizer.step()
        result = torch.full_like(weights, math.nan)
        for p, part in zip(params, parts, strict=True):
            result[part] = p.detach()
        return result

    whole = trained([torch.arange(7186)])
    assert torch.equal(trained(list(torch.arange(7186).split([1, 63, 3001, 4121]))), whole)
    assert torch.equal(trained([torch.randperm(7186)]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [False, True])
def test_no_gradient_and_no_rate_move_nothing(dtype, rounding) -> None:
    """So a distributed checkpoint makes room for a state."""
    if rounding and dtype != torch.bfloat16:
        pytest.skip("bfloat16 alone is rounded stochastically")
    ours = parameters(dtype)
    before = copies(ours)
    optimizer = fastlock.ProximalAdamW(ours, lr=torch.tensor(0.0), stochastic_rounding=rounding, max_grad_norm=1.0)
    for p in ours:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(ours, before)
    assert all(not optimizer.state[p][name].any() for p in ours for name in ("exp_avg", "exp_avg_sq"))
    assert all("anchor" not in optimizer.state[p] for p in ours)


def test_a_rate_may_be_a_tensor() -> None:
    """It counts as the number that it holds."""
    ours = parameters()
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW(ours, lr=torch.tensor(0.01))
    adamw = torch.optim.AdamW(theirs, lr=torch.tensor(0.01).item(), foreach=False)
    fed(theirs, ours)
    optimizer.step()
    adamw.step()
    assert same(ours, theirs)
    with pytest.raises(FastlockError, match="a tensor of 2 numbers"):
        fastlock.ProximalAdamW(ours, lr=torch.ones(2))


def test_parameters_without_gradients_are_left_as_they_are() -> None:
    ours = parameters()
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW(ours)
    adamw = torch.optim.AdamW(theirs, foreach=False)
    for skipped in (1, 4, None, 1):
        fed(theirs, ours)
        if skipped is not None:
            ours[skipped].grad = theirs[skipped].grad = None
        optimizer.step()
        adamw.step()
        assert same(ours, theirs)
    optimizer.zero_grad()
    before = contents(optimizer)
    optimizer.step()
    assert same(ours, theirs)
    assert equal(contents(optimizer), before)


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = fastlock.ProximalAdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert optimizer.step(closure) < 3


# Moments and anchors of another dtype than the weights.


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "anchor_dtype"),
    [
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float32, torch.bfloat16, None),
    ],
)
def test_other_dtypes_are_stepped_in_float32_and_rounded_once(dtype, state_dtype, anchor_dtype) -> None:
    ours = parameters(dtype)
    optimizer = fastlock.ProximalAdamW(ours, lr=0.01, pull=0.4, state_dtype=state_dtype, anchor_dtype=anchor_dtype)
    optimizer.anchor()
    for _ in range(3):
        wide = [p.detach().clone().float() for p in ours]
        before = [{name: x.clone() for name, x in optimizer.state[p].items()} for p in ours]
        for p in ours:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, w, state in zip(ours, wide, before, strict=True):
            assert state["exp_avg"].dtype == (state_dtype or dtype)
            assert state["anchor"].dtype == (anchor_dtype or dtype)
            q = nn.Parameter(w.clone())
            adamw = torch.optim.AdamW([q], lr=0.01, foreach=False)
            q.grad = p.grad.float() + 0.4 * (w - state["anchor"].float())
            if state_dtype is None:  # all in bfloat16, each operation rounded
                continue
            adamw.state[q] = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[q]["step"] = state["step"].clone()
            adamw.step()
            assert torch.equal(p, q.detach().to(dtype))
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][name], adamw.state[q][name].to(state_dtype))


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    """A step of a hundredth of a unit in the last place is lost to the nearest, and kept in the mean at random."""
    weights = {}
    for rounding in (False, True):
        weight = nn.Parameter(torch.ones(40_000, dtype=torch.bfloat16))
        optimizer = fastlock.ProximalAdamW([weight], lr=2**-14, weight_decay=0.0, stochastic_rounding=rounding, seed=3)
        for _ in range(20):
            weight.grad = torch.full_like(weight, 1.0)
            optimizer.step()
        weights[rounding] = weight.detach().double()
    assert (weights[False] == 1).all()
    assert set(weights[True].unique().tolist()) <= {1 - i * 2**-8 for i in range(12)}
    mean, expected = float(weights[True].mean()), 1 - 20 * 2**-14
    assert abs(mean - expected) < 5 * float(weights[True].std()) / 200
    assert mean < 1 - 10 * 2**-14


def test_stochastic_rounding_is_repeatable_and_depends_on_seed_step_and_place() -> None:
    def stepped(seed, steps=1, twice=False):
        params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = fastlock.ProximalAdamW(params, lr=2**-10, weight_decay=0.0, stochastic_rounding=True, seed=seed)
        for _ in range(steps):
            for p in params:
                p.data.fill_(1)
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach() < 1 for p in params]

    one, other = stepped(0)
    assert torch.equal(one, stepped(0)[0])
    for another in (other, stepped(1)[0], stepped(0, steps=2)[0], one.roll(1), one.roll(64)):
        agree = (one == another).double().mean().item()
        share = one.double().mean().item()
        expected = share**2 + (1 - share) ** 2
        assert 0.1 < share < 0.4
        assert abs(agree - expected) < 0.04


# The GradScaler's protocol.


def scaler_of(scale=2.0**12):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_a_scaler_leaves_its_scale_to_the_step() -> None:
    ours = parameters()
    theirs = copies(ours)
    optimizer = fastlock.ProximalAdamW(ours, pull=0.5, max_grad_norm=1.0)
    adamw = torch.optim.AdamW(theirs, foreach=False)
    optimizer.anchor()
    anchor = [q.detach().clone() for q in theirs]
    scaler = scaler_of(3000.0)
    for _ in range(3):
        scale = scaler.scale(torch.ones(()))
        for p, q, a in zip(ours, theirs, anchor, strict=True):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad * scale.double().reciprocal().float() + 0.5 * (q.detach() - a)
        nn.utils.clip_grad_norm_(theirs, 1.0, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        adamw.step()
        assert same(ours, theirs)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_after_infinite_gradients_nothing_is_touched(bad, unscaled) -> None:
    ours = parameters()
    optimizer = fastlock.ProximalAdamW(ours, max_grad_norm=1.0)
    optimizer.anchor()
    scaler = scaler_of()
    for step in range(3):
        for p in ours:
            p.grad = torch.randn_like(p) * scaler.scale(torch.ones(()))
        if step == 1:
            ours[3].grad[17] = bad
        weights, before = copies(ours), contents(optimizer)
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert same(ours, weights) == (step == 1)
        assert equal(contents(optimizer), before) == (step == 1)
    assert all(optimizer.state[p]["step"] == 2 for p in ours)


# Saving and loading.


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
