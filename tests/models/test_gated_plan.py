"""Plans whose locks have a gate: other fine-tunes come into the same memory, and each gets its gate once."""

import pytest
import torch
from torch import nn

import fastlock
from fastlock.models.sites import sites
from fastlock.models.unfolded import unfolded
from tests.helpers.families import gated_lock, logits, random_lock, same_state, state, tiny_model, tokens


def copied_into(model: nn.Module, other: nn.Module, what: str = "weight") -> None:
    """Other weights in the same memory, as a server loads them."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(what) and name in theirs:
                parameter.copy_(theirs[name])


def relocked_alone(seed: int, lock: fastlock.Lock, strength: float) -> dict[str, torch.Tensor]:
    model = tiny_model("llama", torch.bfloat16, seed=seed)
    fastlock.relock(model, lock, strength)
    return state(model)


@pytest.mark.parametrize("constant", [True, False], ids=["both", "gate"])
def test_each_run_starts_from_original_columns(constant: bool) -> None:
    models = [tiny_model("llama", torch.bfloat16, seed=seed) for seed in (1, 2)]
    lock, other = gated_lock(models[0], constant=constant), gated_lock(models[0], [(0, 1), (1, 3)], seed=7)
    plan = fastlock.Plan(models, lock, 1.5)
    plan.relock()
    assert same_state(state(models[1]), relocked_alone(2, lock, 1.5))
    addresses = [t.data_ptr() for t in (sites(models[0])[0].weight, *plan.biases[0].values())]
    plan.relock()
    copied_into(models[0], tiny_model("llama", torch.bfloat16, seed=3))  # all of it, or only some layers
    copied_into(models[1].model.layers[2], tiny_model("llama", torch.bfloat16, seed=3).model.layers[2])
    plan.relock(strength=2.0)
    assert addresses == [t.data_ptr() for t in (sites(models[0])[0].weight, *plan.biases[0].values())]
    assert same_state(state(models[0]), relocked_alone(3, lock, 2.0))
    assert torch.equal(sites(models[1])[0].weight, relocked_alone(2, lock, 2.0)[f"{sites(models[1])[0].name}.weight"])
    assert torch.equal(sites(models[1])[2].weight, relocked_alone(3, lock, 2.0)[f"{sites(models[1])[2].name}.weight"])
    assert [fastlock.verify(model, lock).strength for model in models] == [2.0, 2.0]
    assert [receipt.rank for receipt in plan.receipts] == [2, 2]
    assert bool(plan.biases[0]) == constant
    copied_into(models[0], tiny_model("llama", torch.bfloat16, seed=4))
    plan.relock(other, 1.0)
    assert same_state(state(models[0]), relocked_alone(4, other, 1.0))
    copied_into(models[0], tiny_model("llama", torch.bfloat16, seed=5))
    plan.relock(random_lock(models[0]), 3.0)  # without a gate: as any plan from here on
    plan.relock()
    assert same_state(state(models[0]), relocked_alone(5, random_lock(models[0]), 3.0))
    fastlock.unlock(models[0])
    assert same_state(state(models[0]), state(tiny_model("llama", torch.bfloat16, seed=5)))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_an_error_leaves_weights_and_biases_as_they_were(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny_model(model_type, seed=1), tiny_model(model_type, seed=2)]
    plan = fastlock.Plan(models, gated_lock(models[0]), 1.5)
    plan.relock()
    copied_into(models[0], tiny_model(model_type, seed=3))
    before = [state(model) for model in models]
    with pytest.raises(fastlock.FastlockError, match="too large"):
        plan.relock(strength=1e39)
    monkeypatch.setattr("fastlock.models.gated_plan._kind", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.relock(strength=2.0)
    monkeypatch.undo()
    assert all(same_state(state(model), earlier) for model, earlier in zip(models, before, strict=True))
    plan.relock()
    fresh = tiny_model(model_type, seed=3)
    fastlock.relock(fresh, gated_lock(models[0]), 1.5)
    if model_type == "llama":  # whose biases are the lock's alone
        assert same_state(state(models[0]), state(fresh))
    fastlock.unlock(models[1])
    assert same_state(state(models[1]), state(tiny_model(model_type, seed=2)))


def is_unfolded(model: nn.Module, seed: int, lock: fastlock.Lock, strength: float) -> bool:
    """Whether a model with these weights, and the biases of seed 1, computes what the lock makes of it."""
    plain = tiny_model("opt", torch.float64, seed=1)
    copied_into(plain, tiny_model("opt", torch.float64, seed=seed))
    without = logits(plain, tokens())
    with unfolded(plain, lock, strength):
        truth = logits(plain, tokens())
    assert (truth - without).abs().max() > 0.1
    return bool((logits(model, tokens()) - truth).abs().max() < 1e-12)


@pytest.mark.parametrize("constant", [True, False], ids=["both", "gate"])
def test_a_gate_takes_the_place_of_a_constant_lock_of_the_same_layers(constant: bool) -> None:
    model, bystander = (tiny_model("opt", torch.float64, seed=seed) for seed in (1, 2))
    first, lock = random_lock(model), gated_lock(model, constant=constant)
    plan = fastlock.Plan([bystander, model], first, 1.0)
    plan.relock()
    plan.relock([first, lock], 2.0)
    assert is_unfolded(model, 1, lock, 2.0)
    copied_into(model, tiny_model("opt", torch.float64, seed=3))
    plan.relock(strength=1.0)
    assert is_unfolded(model, 3, lock, 1.0)
    assert [fastlock.verify(bystander, first).strength, fastlock.verify(model, lock).strength] == [1.0, 1.0]
    assert [receipt.rank for receipt in plan.receipts] == [0, 2]


@pytest.mark.parametrize("by_plan", [True, False])
def test_after_a_gate_the_plan_of_a_constant_lock_reads_the_weights(by_plan: bool) -> None:
    """And not the columns that were kept beside the gate."""
    model = tiny_model("opt", torch.float64, seed=1)
    lock, constant = gated_lock(model, [(0, 1), (2, 2)]), random_lock(model)
    plan = fastlock.Plan([model], lock if by_plan else constant, 2.0)
    plan.relock() if by_plan else fastlock.relock(model, lock)
    plan.relock(constant, 2.0)
    assert is_unfolded(model, 1, constant, 2.0)
    copied_into(model, tiny_model("opt", torch.float64, seed=3))
    plan.relock()
    assert is_unfolded(model, 3, constant, 2.0)
    fastlock.unlock(model)
    expected = tiny_model("opt", torch.float64, seed=1)
    copied_into(expected, tiny_model("opt", torch.float64, seed=3))
    assert same_state(state(model), state(expected))


def test_a_plan_does_not_take_what_was_trained_for_a_fine_tune_before_its_first_run() -> None:
    model = tiny_model("llama")
    lock = gated_lock(model)
    fastlock.relock(model, lock)
    with torch.no_grad():
        sites(model)[0].module.weight.add_(1)
    with pytest.raises(fastlock.DamagedError, match="changed since"):
        fastlock.Plan([model], lock).relock()


def test_bare_projections_take_no_gate() -> None:
    model = tiny_model("llama")
    bare = {site.layer: site.weight for site in sites(model)}
    with pytest.raises(fastlock.UnsupportedError, match=r"models\[0\]: the lock has a gate.*Give the model"):
        fastlock.Plan([bare], gated_lock(model)).relock()
