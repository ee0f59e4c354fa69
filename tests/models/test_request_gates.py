"""Locks with a gate per request: each row of a batch has its own lock's gate, and no other's."""

import copy

import pytest
import torch
from torch import nn

import fastlock
from fastlock.models.request_locks import LockedLinear, RequestLocks
from fastlock.models.sites import sites
from fastlock.models.unfolded import unfolded
from tests.helpers.families import gated_lock, logits, random_lock, same_state, state, tiny_model, tokens

# The tables are float32, and so are norms and softmax inside, each good to 2**-24 of the largest logit; 16 of these.
EXACT = 2.0**-20
ASSIGNED, STRENGTHS = [1, -1, 0, 2, 0], [6.0, None, 2.0, None, 0.5]


def three_locks(model: nn.Module) -> list[fastlock.Lock]:
    """Both parts; a constant alone; and a gate alone, of another rank, that shares a head with the first."""
    return [
        gated_lock(model),
        random_lock(model, [(1, 0), (0, 3)], seed=4),
        gated_lock(model, [(0, 3), (1, 2)], seed=5, rank=3, constant=False),
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_each_request_has_its_own_gate(model_type: str, packed: bool) -> None:
    model = tiny_model(model_type, torch.float64)
    ids, before, locks = torch.cat([tokens(seed=seed) for seed in range(5)]), state(model), three_locks(model)
    truths = []
    for number, strength, of_request in zip(ASSIGNED, STRENGTHS, ids, strict=True):
        if number == -1:
            truths.append(logits(model, of_request[None]))
            continue
        with unfolded(model, locks[number], strength):
            truths.append(logits(model, of_request[None]))
    with RequestLocks(model, locks) as requests:
        if packed:  # one entry for each row of x
            projection = next(module for module in model.modules() if isinstance(module, LockedLinear))
            requests.assign([0, -1, 2, 1], 1.5, packed=True)
            x = torch.randn(1, 4, 64, dtype=torch.float64)
            each = projection(x)[0]
            for row, number in enumerate([0, -1, 2, 1]):
                requests.assign([number], 1.5)
                torch.testing.assert_close(each[row], projection(x[:, row])[0], rtol=0, atol=1e-12)
        else:
            requests.assign(ASSIGNED, STRENGTHS)
            found = logits(model, ids)
            for row, truth in zip(found, truths, strict=True):
                torch.testing.assert_close(row, truth[0], rtol=0, atol=EXACT * truth.abs().max().item())
        assert same_state(state(model), before), "the tables are not saved"
    assert same_state(state(model), before)


def projected(model: nn.Module, lock: fastlock.Lock, x: torch.Tensor, strength: float) -> torch.Tensor:
    """The first layer's projection of x with everything unfolded, with gradients."""
    site = sites(model)[0]
    d, gate = lock.constant(strength)[0].dense(site.num_heads * site.head_dim), lock.gates(strength)[0]
    readers, writers = gate.dense(site.num_heads * site.head_dim)
    return site.module(x + d + (x @ readers) @ writers.T)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradients_go_through_the_gate(model_type: str) -> None:
    plain = tiny_model(model_type, torch.float64)
    model, lock = copy.deepcopy(plain), gated_lock(plain)
    width = sites(plain)[0].weight.shape[1]
    x, weights = torch.randn(2, 3, width, dtype=torch.float64), torch.randn(2, 3, 64, dtype=torch.float64)
    given, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    (projected(plain, lock, given, 1.5) * weights).sum().backward()
    with RequestLocks(model, [lock]) as requests:
        requests.assign([0, 0], 1.5)
        projection = next(module for module in model.modules() if isinstance(module, LockedLinear))
        (projection(ours) * weights).sum().backward()
        found = projection.weight.grad
    truth = sites(plain)[0].module.weight.grad
    torch.testing.assert_close(ours.grad, given.grad, rtol=0, atol=EXACT * given.grad.abs().max().item())
    torch.testing.assert_close(found, truth, rtol=0, atol=EXACT * truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits_and_compiled(dtype: torch.dtype) -> None:
    """Within three roundings of the sizes that are added up; rows without a gate as without any gate, to the bit."""
    model = tiny_model("llama", dtype)
    lock, constant = gated_lock(model), random_lock(model, [(0, 2)], seed=3)
    x = torch.randn(3, 4, 128).to(dtype)
    with RequestLocks(model, [constant]) as requests:
        requests.assign([-1, 0, -1], 2.0)
        without = next(module for module in model.modules() if isinstance(module, LockedLinear))(x).detach()
    truth = projected(copy.deepcopy(model).double(), lock, x[2].double(), 1.0)
    size = x[2].double().abs() @ sites(model)[0].weight.double().abs().T + truth.abs()
    with RequestLocks(model, [constant, lock]) as requests:
        requests.assign([-1, 0, 1], [None, 2.0, 1.0])
        projection = next(module for module in model.modules() if isinstance(module, LockedLinear))
        with torch.no_grad():
            found = projection(x)
            compiled = torch.compile(projection, backend="eager", fullgraph=True)(x)
        assert torch.equal(found[:2], without[:2])
        assert ((found[2].double() - truth).abs() <= 1.5 * torch.finfo(dtype).eps * size).all()
        assert torch.equal(compiled, found)
        with torch.no_grad():
            projection.weight.mul_(0.5)
            torch.testing.assert_close(
                projection(x)[2].double(), truth / 2, rtol=0, atol=1.5 * size.max().item() * 2**-8
            )
            projection.weight[0] = float("nan")
        with pytest.raises(fastlock.DamagedError, match="not finite"):
            projection(x)
