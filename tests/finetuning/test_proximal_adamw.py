"""ProximalAdamW on a CPU, against torch's own AdamW that is fed g + pull (w - anchor)."""

import math

import pytest
import torch
from torch import nn

import fastlock
from fastlock.errors import FastlockError
from tests.finetuning.fed_adamw import DTYPES, contents, copies, equal, fed, parameters, same


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
