"""Plans: the same models relocked again and again, in the same memory, whatever happens to them in between."""

import copy
import dataclasses
import math
import os
import pickle
import signal
import threading

import numpy
import pytest
import torch
from torch import nn

import fastlock
from fastlock import fold as fold_module
from fastlock.models import plan as plan_module
from fastlock.models.members import prepare
from fastlock.models.sites import sites_for
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.models.test_relocking import biases, expected_biases, same_biases

MODEL_TYPES = ["llama", "gpt2", "gpt_oss", "opt"]


def addresses(model: nn.Module, lock: fastlock.Lock) -> list[int]:
    return [site.bias.data_ptr() for site in sites_for(model, lock)]


def other_weights(model: nn.Module, seed: int) -> nn.Module:
    """Another fine-tune, written into the memory of this one; the biases of locked layers excepted."""
    with torch.no_grad():
        other = tiny_model(model.config.model_type, model.dtype, seed=seed)
        names = {name for name, _ in other.named_parameters() if not name.endswith(".bias")}
        for name in names:
            model.get_parameter(name).copy_(other.get_parameter(name))
    return model


def unlocked_biases(model: nn.Module, lock: fastlock.Lock, strength: float) -> dict[int, torch.Tensor | None]:
    """What relocking must give, from a copy of the model without its lock."""
    plain = copy.deepcopy(model)
    fastlock.unlock(plain)
    return expected_biases(plain, lock, strength)


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """How often models are looked up and checked."""
    calls: list[int] = []

    def counted(models, *args):
        calls.append(len(models))
        return prepare(models, *args)

    monkeypatch.setattr("fastlock.models.plan.prepare", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_plan_folds_what_is_there_now_into_the_same_biases(
    model_type: str, dtype: torch.dtype, built: list[int]
) -> None:
    model = tiny_model(model_type, dtype)
    lock, before = random_lock(model), state(model)
    want = expected_biases(model, lock, 2.0)
    plan = fastlock.Plan([model], lock, 2.0)
    assert same_state(state(model), before), "a plan alone changes nothing"
    assert plan.biases == []
    plan.relock()
    assert same_biases(biases(model), want)
    placed = addresses(model, lock)
    for seed in (5, 6):
        other_weights(model, seed)
        assert not fastlock.verify(model, lock)
        plan.relock()
        assert same_biases(biases(model), unlocked_biases(model, lock, 2.0))
        assert fastlock.verify(model, lock).strength == 2.0
        assert addresses(model, lock) == placed
    assert built == [1]
    fastlock.unlock(model)
    assert same_state(state(other_weights(tiny_model(model_type, dtype), 6)), state(model))


def test_another_strength_sends_only_displacements(built: list[int]) -> None:
    model = tiny_model("gpt2")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    placed = addresses(model, lock)
    plan.relock(strength=3.5)
    assert same_biases(biases(model), unlocked_biases(model, lock, 3.5))
    assert fastlock.verify(model, lock).strength == 3.5
    plan.relock()
    assert fastlock.verify(model, lock).strength == 3.5, "it stays"
    plan.relock(strength=0)
    assert fastlock.verify(model, lock).state == "not locked"
    assert (addresses(model, lock), built) == (placed, [1])


def test_another_lock_of_the_same_layers_goes_into_the_same_biases() -> None:
    model = tiny_model("llama")
    lock = random_lock(model, [(0, 1), (2, 2)])
    same_heads = random_lock(model, [(0, 1), (2, 2)], seed=7)
    same_layers = random_lock(model, [(0, 0), (0, 3), (2, 1)], seed=8)
    other_layers = random_lock(model, [(1, 0)], seed=9)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    placed = addresses(model, lock)
    for other in (same_heads, same_layers):
        plan.relock(other, 3.0)
        assert same_biases(biases(model), unlocked_biases(model, other, 3.0))
        assert fastlock.verify(model, other).strength == 3.0
        assert not fastlock.verify(model, lock)
        assert addresses(model, lock) == placed
    plan.relock(other_layers)
    assert same_biases(biases(model), unlocked_biases(model, other_layers, 6.0))
    assert [list(of_model) for of_model in plan.biases] == [[1]]


def test_each_model_its_lock_and_strength() -> None:
    models = [tiny_model("llama", seed=1), tiny_model("opt", seed=2), tiny_model("llama", torch.bfloat16, seed=3)]
    locks = [random_lock(model, seed=seed) for seed, model in enumerate(models)]
    want = [expected_biases(model, lock, s) for model, lock, s in zip(models, locks, (1.0, 2.0, 3.0), strict=True)]
    receipts = fastlock.relock_many(models, locks, [1.0, 2.0, 3.0])
    assert all(same_biases(biases(model), w) for model, w in zip(models, want, strict=True))
    assert [receipt.strength for receipt in receipts] == [1.0, 2.0, 3.0]
    assert [receipt.lock_digest for receipt in receipts] == [lock.digest for lock in locks]
    plan = fastlock.Plan(models, locks, [2.0, None, 1.0])
    plan.relock()
    assert [receipt.strength for receipt in plan.receipts] == [2.0, 6.0, 1.0]
    plan.relock(strength=[None, 4.0, None])
    assert [receipt.strength for receipt in plan.receipts] == [2.0, 4.0, 1.0]
    for model, lock, strength in zip(models, locks, (2.0, 4.0, 1.0), strict=True):
        assert fastlock.verify(model, lock).strength == strength
        assert same_biases(biases(model), unlocked_biases(model, lock, strength))


def test_models_of_other_shapes_and_families_in_one_call() -> None:
    models = [tiny_model("llama"), tiny_model("llama", hidden_size=96, num_attention_heads=6), tiny_model("gemma")]
    lock = random_lock(models[0], [(0, 1), (1, 2)])
    plan = fastlock.Plan(models, lock)
    plan.relock()
    assert all(fastlock.verify(model, lock) for model in models)


def test_no_model_is_nothing_to_do() -> None:
    lock = random_lock(tiny_model("llama"))
    plan = fastlock.Plan([], lock)
    for strength in (None, None, 2.0):
        plan.relock(strength=strength)
    assert (plan.biases, plan.receipts) == ([], [])
    with pytest.raises(fastlock.FastlockError, match="given twice"):
        fastlock.Plan([model := tiny_model("llama"), model], lock).relock()


def test_wrong_numbers_of_locks_and_strengths() -> None:
    models = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    lock = random_lock(models[0])
    for call in (fastlock.relock_many, fastlock.Plan):
        with pytest.raises(fastlock.FastlockError, match="lock: 1 were given for 2 models"):
            call(models, [lock])
        with pytest.raises(fastlock.FastlockError, match="strength: 3 were given for 2 models"):
            call(models, lock, [1.0, 2.0, 3.0])
        with pytest.raises(fastlock.FastlockError, match="load it first"):
            call(models, "a path")
        with pytest.raises(fastlock.FastlockError, match="negative"):
            call(models, lock, [1.0, -1.0])
        with pytest.raises(fastlock.FastlockError, match="list of models"):
            call(models[0], lock)


def replace_weight(model: nn.Module) -> None:
    o_proj = model.model.layers[2].self_attn.o_proj
    o_proj.weight = nn.Parameter(torch.randn_like(o_proj.weight))


def replace_data(model: nn.Module) -> None:
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.weight.data = torch.randn_like(o_proj.weight)


def replace_module(model: nn.Module) -> None:
    attention = model.model.layers[2].self_attn
    attention.o_proj = nn.Linear(128, 64, bias=False)


def replace_layer(model: nn.Module) -> None:
    model.model.layers[2] = copy.deepcopy(tiny_model("llama", seed=9).model.layers[2])


def unlock(model: nn.Module) -> None:
    fastlock.unlock(model)


def relock_otherwise(model: nn.Module) -> None:
    fastlock.relock(model, random_lock(model, [(1, 1)], seed=3), 1.0)


def to_bfloat16(model: nn.Module) -> None:
    model.bfloat16()


def copy_of_all(model: nn.Module) -> None:
    model._apply(lambda tensor: tensor.clone())


@pytest.mark.parametrize(
    "change",
    [replace_weight, replace_data, unlock, relock_otherwise, to_bfloat16, copy_of_all],
    ids=lambda c: c.__name__,
)
def test_what_was_moved_or_replaced_is_noticed(change, built: list[int]) -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    change(model)
    plan.relock()
    assert built == [1, 1]
    assert same_biases(biases(model), unlocked_biases(model, lock, 2.0))
    assert fastlock.verify(model, lock).strength == 2.0
    plan.relock()
    assert built == [1, 1]


@pytest.mark.parametrize("change", [replace_module, replace_layer], ids=lambda c: c.__name__)
def test_replaced_modules_are_noticed(change) -> None:
    """The lock is gone with them; the new ones get it."""
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    change(model)
    plain = copy.deepcopy(model)
    fastlock.unlock(plain)
    assert all(site.bias is None for site in sites_for(plain, lock))
    plan.relock()
    assert same_biases(biases(model), expected_biases(plain, lock, 2.0))
    assert fastlock.verify(model, lock).strength == 2.0
    fastlock.unlock(model)
    assert same_state(state(model), state(plain))


def test_a_replaced_module_with_a_bias_is_refused() -> None:
    """It may be its own, or the lock's in a module that was made of the earlier one."""
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    model.model.layers[2].self_attn.o_proj = nn.Linear(128, 64)
    for change in (plan.relock, lambda: fastlock.relock(model, lock), lambda: fastlock.unlock(model)):
        with pytest.raises(fastlock.DamagedError, match=r"layers\.2\.self_attn\.o_proj was replaced since"):
            change()


@pytest.mark.parametrize("how", ["no_grad", "data", "numpy"])
def test_a_fine_tunes_own_bias_is_never_lost(how: str) -> None:
    """Servers copy weights in ways that torch does not count."""
    model, other = tiny_model("gpt_oss"), tiny_model("gpt_oss", seed=5)
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            if how == "no_grad":
                mine.copy_(its)
            elif how == "data":
                mine.data.copy_(its.data)
            else:
                mine.detach().numpy()[:] = its.detach().numpy()
    with pytest.raises(fastlock.DamagedError, match="bias was changed since"):
        plan.relock()
    assert same_biases(biases(model), biases(other))


def test_a_bias_that_others_wrote_to_is_not_overwritten() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.bias.add_(1)
    before = biases(model)
    with pytest.raises(fastlock.DamagedError, match="bias was changed since"):
        plan.relock()
    assert same_biases(biases(model), before)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_error_leaves_the_biases_as_they_were(model_type: str) -> None:
    models = [tiny_model(model_type, torch.float16, seed=seed) for seed in (1, 2)]
    lock = random_lock(models[0])
    plan = fastlock.Plan(models, lock, 2.0)
    plan.relock()
    before = [biases(model) for model in models]
    with pytest.raises(fastlock.FastlockError, match=r"not finite in torch.float16.*strength"):
        plan.relock(strength=[2.0, 1e7])
    assert all(same_biases(biases(model), b) for model, b in zip(models, before, strict=True))
    assert all(fastlock.verify(model, lock).strength == 2.0 for model in models)
    site = sites_for(models[1], lock)[1]
    head, kept = lock.heads[lock.layers == site.layer][0] * site.head_dim, site.weight[3].clone()
    site.weight[3, head + 1] = math.nan
    with pytest.raises(fastlock.DamagedError, match=f"^{site.name}: its fold is not finite"):
        plan.relock()
    assert all(same_biases(biases(model), b) for model, b in zip(models, before, strict=True))
    site.weight[3] = kept
    plan.relock(strength=3.0)
    assert all(fastlock.verify(model, lock).strength == 3.0 for model in models)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, fastlock.FastlockError])
@pytest.mark.parametrize("method", ["start", "finish"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_any_error_leaves_the_biases_as_they_were(monkeypatch, model_type: str, method: str, error: type) -> None:
    """Also where it comes with some biases written; and the next call is as if it had not been."""
    model = tiny_model(model_type)
    lock, before_all = random_lock(model), state(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    before = biases(model)

    def fails(self):
        self.results[0].fill_(math.nan)
        raise error("out of memory")

    for strength in (None, 3.0):
        with monkeypatch.context() as patched:
            patched.setattr(fold_module._ByReference, method, fails)
            with pytest.raises(error):
                plan.relock(strength=strength)
        assert same_biases(biases(model), before)
        plan.relock()
        assert same_biases(biases(model), before)
        assert fastlock.verify(model, lock).strength == 2.0
        assert plan.receipts[0].strength == 2.0
    plan.relock(strength=3.0)
    assert fastlock.verify(model, lock).strength == 3.0
    fastlock.unlock(model)
    assert same_state(state(model), before_all)


def test_an_error_while_copies_change_places(monkeypatch) -> None:
    """Each module's copy must be that of its bias, or nothing could be unlocked any more."""
    model = tiny_model("llama")
    lock, before = random_lock(model), state(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    real = plan_module._Built._place

    def interrupted(self, copies):
        monkeypatch.setattr(plan_module._Built, "_place", real)
        self._buffers[0]["fastlock_placed_bias"] = copies[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module._Built, "_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.relock(strength=3.0)
    assert fastlock.verify(model, lock).strength == 2.0
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_an_error_after_the_first_fold_changes_nothing(monkeypatch) -> None:
    model = tiny_model("llama")
    before = state(model)
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastlock.models.plan.Links", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.relock()
    assert same_state(state(model), before)
    assert plan.biases == []
    plan.relock()
    assert fastlock.verify(model, lock)


def test_an_undone_change_by_others_leaves_the_plan_as_it_is() -> None:
    model, other = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    lock, before = random_lock(model), state(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    fastlock.relock(other, lock, 2.0)
    with torch.no_grad():
        other.model.layers[2].self_attn.o_proj.bias.add_(1)
    with pytest.raises(fastlock.DamagedError, match="bias was changed since"):
        fastlock.relock_many([model, other], lock, 1.0)
    plan.relock(strength=3.0)
    assert fastlock.verify(model, lock).strength == 3.0
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_the_strength_of_a_lock_that_stays_stays() -> None:
    models = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    first, second = (random_lock(models[0], seed=seed) for seed in (1, 2))
    plan = fastlock.Plan(models, first, 2.0)
    plan.relock()
    plan.relock([first, second])
    assert [receipt.strength for receipt in plan.receipts] == [2.0, 6.0]


def test_an_error_at_first_changes_nothing() -> None:
    models = [tiny_model("llama"), tiny_model("gpt2", head_dim=None)]
    plan = fastlock.Plan(models, random_lock(models[0]))
    before = [state(model) for model in models]
    for _ in range(2):
        with pytest.raises(fastlock.MismatchError, match="head_dim"):
            plan.relock()
    assert all(same_state(state(model), b) for model, b in zip(models, before, strict=True))
    with pytest.raises(fastlock.FastlockError, match="nothing was relocked yet"):
        _ = plan.receipts


def test_an_original_bias_keeps_its_identity_and_its_gradient() -> None:
    model = tiny_model("gpt_oss")
    lock, before = random_lock(model), state(model)
    parameters = [site.bias for site in sites_for(model, lock)]
    plan = fastlock.Plan([model], lock)
    for strength in (1.0, 2.0):
        plan.relock(strength=strength)
        assert all(
            site.bias is p and p.requires_grad for site, p in zip(sites_for(model, lock), parameters, strict=True)
        )
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_receipts_are_of_the_last_relock() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    (first,) = plan.receipts
    assert first.to_dict() == fastlock.relock(tiny_model("llama"), lock, 2.0).to_dict()
    other_weights(model, 4)
    plan.relock()
    (second,) = plan.receipts
    assert second.to_dict() == fastlock.relock(other_weights(tiny_model("llama"), 4), lock, 2.0).to_dict()
    assert second.weights_digest != first.weights_digest


@pytest.mark.parametrize("change", ["weights", "unlock", "relock"])
def test_no_receipt_of_what_was_not_done(change: str) -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    if change == "weights":
        other_weights(model, 4)
    elif change == "unlock":
        fastlock.unlock(model)
    else:
        fastlock.relock(model, random_lock(model, [(1, 1)], seed=3), 1.0)
    with pytest.raises(fastlock.FastlockError, match="was changed since it was relocked"):
        _ = plan.receipts
    plan.relock()
    assert plan.receipts[0].strength == 2.0


def test_strengths_as_arrays() -> None:
    models = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    lock = random_lock(models[0])
    for given in (torch.tensor([1.0, 2.0]), numpy.array([1.0, 2.0])):
        assert [receipt.strength for receipt in fastlock.relock_many(models, lock, given)] == [1.0, 2.0]
        with pytest.raises(fastlock.FastlockError, match="strength: 1 were given for 2"):
            fastlock.relock_many(models, lock, given[:1])
    assert [receipt.strength for receipt in fastlock.relock_many(models, lock, torch.tensor(3.0))] == [3.0, 3.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_relocks() -> None:
    """Nobody in the child would ever let go of the plan."""
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    with plan._one_at_a_time:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)
                plan.relock(strength=3.0)
                os._exit(0 if fastlock.verify(model, lock).strength == 3.0 else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_a_planned_model_is_saved_with_its_lock(tmp_path) -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    other_weights(model, 4)
    plan.relock(strength=3.0)
    model.save_pretrained(tmp_path / "saved")
    assert fastlock.verify(tmp_path / "saved", lock).strength == 3.0


def test_plans_are_not_copied() -> None:
    model = tiny_model("llama")
    plan = fastlock.Plan([model], random_lock(model))
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(fastlock.FastlockError, match="Make a new one"):
            make(plan)


def test_relocking_in_inference_mode_and_in_threads() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock, 2.0)
    with torch.inference_mode():
        plan.relock()
        plan.relock(strength=3.0)
    want = unlocked_biases(model, lock, 3.0)
    threads = [threading.Thread(target=plan.relock) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_biases(biases(model), want)
    assert fastlock.verify(model, lock)


# Bare output projections


def bare(model: nn.Module, lock: fastlock.Lock) -> dict[int, object]:
    """The tensors alone, of which the plan can't know the model."""
    return {
        site.layer: site.weight.clone() if site.bias is None else (site.weight.clone(), site.bias.detach().clone())
        for site in sites_for(model, lock)
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gpt2"])
def test_bare_projections_give_the_biases_of_their_models(model_type: str) -> None:
    models = [tiny_model(model_type, torch.bfloat16, seed=seed) for seed in (1, 2, 3)]
    lock = random_lock(models[0])
    want = [expected_biases(model, lock, s) for model, s in zip(models, (1.0, 2.0, 3.0), strict=True)]
    plan = fastlock.Plan([bare(models[0], lock), models[1], bare(models[2], lock)], lock, [1.0, 2.0, 3.0])
    plan.relock()
    for found, expected in zip(plan.biases, want, strict=True):
        assert list(found) == [0, 2]
        assert all(torch.equal(found[layer], expected[layer]) for layer in found)
    assert [receipt and receipt.strength for receipt in plan.receipts] == [None, 2.0, None]
    assert fastlock.verify(models[1], lock)


def test_bare_projections_that_are_written_to_or_replaced() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    zoo = [bare(model, lock)]
    plan = fastlock.Plan(zoo, lock, 2.0)
    plan.relock()
    (first,) = plan.biases
    once = {layer: bias.clone() for layer, bias in first.items()}
    zoo[0][0].mul_(2)
    plan.relock()
    assert plan.biases[0][0] is first[0], "the same memory"
    torch.testing.assert_close(first[0], 2 * once[0])
    zoo[0][2] = 3 * zoo[0][2]
    plan.relock()
    torch.testing.assert_close(plan.biases[0][2], 3 * once[2])
    zoo[0][2].data = zoo[0][2].data * 2
    plan.relock()
    torch.testing.assert_close(plan.biases[0][2], 6 * once[2])
    zoo[0][2][5, 2 * 32] = math.inf
    kept = plan.biases[0][0].clone()
    zoo[0][0].mul_(2)
    with pytest.raises(fastlock.DamagedError, match=r"^models\[0\]\[2\]: its fold is not finite"):
        plan.relock()
    assert torch.equal(plan.biases[0][0], kept)


def test_a_bare_bias_that_is_written_to_or_replaced() -> None:
    model = tiny_model("gpt_oss")
    lock = random_lock(model)
    zoo = [bare(model, lock)]
    c = zoo[0][2][1]
    plan = fastlock.Plan(zoo, lock, 2.0)
    plan.relock()
    without = plan.biases[0][2] - c
    c.add_(1)
    plan.relock()
    torch.testing.assert_close(plan.biases[0][2], without + c)
    c.data = torch.randn_like(c)
    plan.relock()
    torch.testing.assert_close(plan.biases[0][2], without + c)


def test_bare_projections_that_do_not_fit() -> None:
    model = tiny_model("llama")
    anywhere = random_lock(model)
    lock = dataclasses.replace(anywhere, num_heads=4, hidden_size=64)
    good = bare(model, lock)
    for change, kind, message in [
        ({0: None}, fastlock.FastlockError, r"models\[1\]\[0\] is NoneType"),
        ({0: "weight"}, fastlock.FastlockError, r"models\[1\]\[0\] is str"),
        ({0: torch.randn(64, 100)}, fastlock.MismatchError, "100 columns cannot be divided into heads of 32"),
        ({0: torch.randn(64)}, fastlock.FastlockError, r"weight is \[64\]"),
        ({0: torch.randn(64, 64)}, fastlock.MismatchError, "num_heads is 2"),
        ({0: torch.randn(96, 128)}, fastlock.MismatchError, "hidden_size is 96"),
        ({0: torch.randn(64, 128).to(torch.int8)}, fastlock.UnsupportedError, "int8"),
        ({0: torch.randn(64, 128, device="meta")}, fastlock.UnsupportedError, "no weights in memory"),
        ({0: (torch.randn(64, 128), torch.randn(63))}, fastlock.DamagedError, r"bias is \[63\]"),
        ({0: (torch.randn(64, 128), torch.randn(64).half())}, fastlock.UnsupportedError, "bias is torch.float16"),
    ]:
        plan = fastlock.Plan([good, good | change], lock)
        with pytest.raises(fastlock.FastlockError, match=message) as error:
            plan.relock()
        assert type(error.value) is kind
    with pytest.raises(fastlock.MismatchError, match="head 3 is locked, but it has 2 heads"):
        fastlock.Plan([{layer: torch.randn(64, 64) for layer in good}], anywhere).relock()
    with pytest.raises(fastlock.FastlockError, match=r"fastlock\.Plan"):
        fastlock.relock_many([good], lock)


def test_freed_weights_are_refused() -> None:
    """As sharding libraries free them: the storage is resized, and the tensor stays."""
    model = tiny_model("llama")
    lock = random_lock(model)
    plan = fastlock.Plan([model], lock)
    plan.relock()
    before = biases(model)
    weight = model.model.layers[2].self_attn.o_proj.weight
    kept = weight.detach().clone()
    weight.untyped_storage().resize_(0)
    with pytest.raises(fastlock.UnsupportedError, match=r"layers\.2\.self_attn\.o_proj\.weight has no memory"):
        plan.relock()
    assert same_biases(biases(model), before)
    with pytest.raises(fastlock.UnsupportedError, match="has no memory"):
        fastlock.relock(model, lock)
    weight.untyped_storage().resize_(kept.untyped_storage().nbytes())
    weight.data.copy_(kept)
    plan.relock()
    assert same_biases(biases(model), before)


# Models that share their output projections


def sharing(model: nn.Module, lock: fastlock.Lock) -> nn.Module:
    """Another model with parameters of its own, over the same memory of the locked projections."""
    other = copy.deepcopy(model)
    for mine, theirs in zip(sites_for(model, lock), sites_for(other, lock), strict=True):
        theirs.module.weight = nn.Parameter(mine.module.weight.detach(), requires_grad=False)
        if mine.bias is not None:
            theirs.module.bias = nn.Parameter(mine.bias.detach(), requires_grad=False)
    return other


@pytest.fixture
def folded(monkeypatch) -> list[str]:
    """The names of the sites that were really folded."""
    names: list[str] = []

    class Recorded(fold_module._ByReference):
        def start(self) -> None:
            names.extend(f.name for f in self._folds)
            super().start()

    monkeypatch.setattr(fold_module, "_ByReference", Recorded)
    return names


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_what_is_shared_is_folded_once(model_type: str, folded: list[str]) -> None:
    base = tiny_model(model_type)
    lock = random_lock(base)
    models = [base, sharing(base, lock), sharing(base, lock), tiny_model(model_type, seed=4)]
    before = [state(model) for model in models]
    want = [expected_biases(model, lock, 2.0) for model in models]
    plan = fastlock.Plan(models, lock, 2.0)
    plan.relock()
    assert len(folded) == 2 * 2
    assert all(same_biases(biases(model), w) for model, w in zip(models, want, strict=True))
    assert plan.biases[0][0].data_ptr() == plan.biases[1][0].data_ptr() != plan.biases[3][0].data_ptr()
    plan.relock(strength=3.0)
    assert len(folded) == 4 * 2
    plan.relock(strength=[1.0, 2.0, 2.0, 3.0])  # now two results for the same weights
    assert len(folded) == 4 * 2 + 3 * 2
    for model, strength in zip(models, (1.0, 2.0, 2.0, 3.0), strict=True):
        assert fastlock.verify(model, lock).strength == strength
    fastlock.unlock(models[1])
    assert fastlock.verify(models[2], lock).strength == 2.0, "each has its lock for itself"
    for model in (models[0], models[2], models[3]):
        fastlock.unlock(model)
    assert all(same_state(state(model), b) for model, b in zip(models, before, strict=True))


def test_models_that_share_weights_but_no_biases_share_nothing_else(folded: list[str]) -> None:
    base = tiny_model("gpt_oss")
    lock = random_lock(base)
    other = sharing(base, lock)
    for site in sites_for(other, lock):
        site.module.bias = nn.Parameter(torch.randn_like(site.bias))
    want = [expected_biases(model, lock, 6.0) for model in (base, other)]
    fastlock.relock_many([base, other], lock)
    assert len(folded) == 4
    assert all(same_biases(biases(model), w) for model, w in zip((base, other), want, strict=True))


def test_one_bias_parameter_in_a_locked_and_another_layer_is_refused() -> None:
    model = tiny_model("gpt_oss")
    lock, layers = random_lock(model, [(0, 1)]), model.model.layers
    layers[1].self_attn.o_proj.bias = layers[0].self_attn.o_proj.bias
    before = state(model)
    with pytest.raises(fastlock.UnsupportedError, match=r"layers\.0\.self_attn\.o_proj\.bias is one parameter"):
        fastlock.relock(model, lock)
    assert same_state(state(model), before)


def test_one_bias_parameter_in_two_models_one_after_the_other() -> None:
    first, second = tiny_model("gpt_oss"), tiny_model("gpt_oss", seed=2)
    lock, before = random_lock(first), state(first)
    for mine, its in zip(first.model.layers, second.model.layers, strict=True):
        its.self_attn.o_proj.bias = mine.self_attn.o_proj.bias
    for _ in range(2):
        fastlock.relock(first, lock, 2.0)
        fastlock.relock(first, lock, 3.0)
        with pytest.raises(fastlock.UnsupportedError, match="is one parameter with that of another module"):
            fastlock.relock(second, lock)
        fastlock.unlock(first)
        assert same_state(state(first), before)
    fastlock.relock(second, lock)
    fastlock.unlock(second)
    assert same_state(state(first), before)


def test_a_compiled_inner_model_is_the_same_model() -> None:
    model = tiny_model("llama")
    lock, before = random_lock(model), state(model)
    plan = fastlock.Plan([model], lock, 2.0)
    plan.relock()
    inner = model.model
    model.model = torch.compile(inner)
    plan.relock(strength=3.0)
    fastlock.relock(model, lock, 4.0)
    assert fastlock.verify(model, lock).strength == 4.0
    fastlock.unlock(model)
    model.model = inner
    assert same_state(state(model), before)


def test_one_bias_parameter_in_two_models_is_refused() -> None:
    base = tiny_model("gpt_oss")
    lock = random_lock(base)
    other = sharing(base, lock)
    other.model.layers[2].self_attn.o_proj.bias = base.model.layers[2].self_attn.o_proj.bias
    before = state(base)
    with pytest.raises(fastlock.UnsupportedError, match="one parameter"):
        fastlock.relock_many([base, other], lock)
    assert same_state(state(base), before)
