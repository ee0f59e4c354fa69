"""Relock, unlock, relocked() and relock_many on models in memory, in the states that users have them in."""

import copy
import dataclasses
import gc
import io
import math
import os
import subprocess
import sys
import weakref

import accelerate
import pytest
import torch
from torch import nn

import fastlock
from fastlock import fold as fold_module
from fastlock.models import unfolded
from fastlock.models.sites import sites
from tests.helpers.families import logits, random_lock, same_state, state, tiny_model, tokens


def biases(model: nn.Module) -> dict[int, torch.Tensor | None]:
    return {site.layer: None if site.bias is None else site.bias.detach().clone() for site in sites(model)}


def expected_biases(model: nn.Module, lock: fastlock.Lock, strength: float) -> dict[int, torch.Tensor | None]:
    """What relocking an unlocked model must give, by a plain float64 sum over the dense displacement."""
    found = biases(model)
    for site in sites(model):
        d = torch.zeros(site.num_heads * site.head_dim, dtype=torch.float64)
        for layer, head, direction, scale in zip(lock.layers, lock.heads, lock.directions, lock.scales, strict=True):
            if layer == site.layer:
                d[head * site.head_dim : (head + 1) * site.head_dim] = strength * scale.double() * direction.double()
        if d.any():
            b = site.weight.double() @ d
            found[site.layer] = (b if site.bias is None else b + site.bias.double()).to(site.weight.dtype)
    return found


def same_biases(a: dict[int, torch.Tensor | None], b: dict[int, torch.Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(
        a[layer] is b[layer] if a[layer] is None else torch.equal(a[layer], b[layer]) for layer in a
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_oss"])
def test_the_bias_is_the_fold_plus_what_was_there(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    lock = random_lock(model)
    expected = expected_biases(model, lock, 2.5)
    fastlock.relock(model, lock, 2.5)
    for layer, bias in biases(model).items():  # two sums in float64, rounded once: the same bits in any smaller dtype
        exactly = 1e-13 if dtype == torch.float64 else 0
        torch.testing.assert_close(bias, expected[layer], rtol=exactly, atol=exactly)
    assert {b.dtype for b in biases(model).values() if b is not None} == {dtype}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_relocking_replaces_never_adds(model_type: str) -> None:
    model = tiny_model(model_type)
    first, second = random_lock(model, [(0, 1), (1, 0)]), random_lock(model, [(1, 3), (2, 2)], seed=9)
    want = expected_biases(model, second, 4.0)
    before = state(model)
    fastlock.relock(model, first)
    fastlock.relock(model, first)
    fastlock.relock(model, first, 1.0)
    fastlock.relock(model, second, 4.0)
    assert same_biases(biases(model), want)
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_the_receipt_says_what_was_done() -> None:
    model = tiny_model("llama", torch.bfloat16)
    lock = random_lock(model)
    receipt = fastlock.relock(model, lock, 2.0)
    assert (receipt.lock_digest, receipt.strength, receipt.layers) == (lock.digest, 2.0, (0, 2))
    assert [site.heads for site in receipt.sites] == [(1, 3), (2,)]
    assert [site.name for site in receipt.sites] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.2.self_attn.o_proj",
    ]
    assert fastlock.Receipt.from_dict(receipt.to_dict(), "here") == receipt
    again = fastlock.relock(model, lock, 2.0)
    assert again.to_dict() == receipt.to_dict()
    other = fastlock.relock(model, lock, 3.0)
    assert other.weights_digest == receipt.weights_digest
    assert other.biases_digest != receipt.biases_digest


def test_the_weights_digest_covers_the_locked_columns_and_nothing_else() -> None:
    lock = random_lock(tiny_model("llama"))
    digests = []
    for column in (None, 0, 1 * 32, 2 * 32):
        model = tiny_model("llama")
        if column is not None:
            model.model.layers[0].self_attn.o_proj.weight.data[5, column] += 1
        digests.append(fastlock.relock(model, lock).weights_digest)
    untouched, head_0, head_1, head_2 = digests
    assert untouched == head_0 == head_2 != head_1


def test_a_receipt_keeps_no_model_alive_and_notices_change() -> None:
    model = tiny_model("llama")
    receipt = fastlock.relock(model, random_lock(model))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.add_(1)
    with pytest.raises(fastlock.FastlockError, match="changed since"):
        receipt.to_dict()
    receipt = fastlock.relock(model, random_lock(model))
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None, "a relocked model must be freed without waiting for the garbage collector"
    finally:
        gc.enable()
    with pytest.raises(fastlock.FastlockError, match="gone"):
        receipt.to_dict()


def test_relocked_is_undone_whatever_happens_inside() -> None:
    model = tiny_model("gpt2")
    lock, before = random_lock(model), state(model)
    with fastlock.relocked(model, lock, 2.0) as inside:
        assert inside is model
        assert fastlock.verify(model, lock).strength == 2.0
    assert same_state(state(model), before)
    with pytest.raises(ZeroDivisionError), fastlock.relocked(model, lock):
        raise ZeroDivisionError
    assert same_state(state(model), before)


def test_relocked_inside_a_relocked_model_brings_the_earlier_lock_back() -> None:
    model = tiny_model("opt")
    first, second = random_lock(model), random_lock(model, [(1, 0)], seed=5)
    fastlock.relock(model, first, 2.0)
    before = state(model)
    with fastlock.relocked(model, second, 3.0):
        assert fastlock.verify(model, second)
        assert not fastlock.verify(model, first)
    assert same_state(state(model), before)
    assert fastlock.verify(model, first)


def test_relock_many_is_all_or_nothing() -> None:
    models = [
        tiny_model("llama", seed=1),
        tiny_model("llama", torch.bfloat16, seed=2),
        tiny_model("gpt2", head_dim=None),
    ]
    lock = random_lock(models[0])
    before = [state(model) for model in models]
    with pytest.raises(fastlock.MismatchError, match="head_dim"):
        fastlock.relock_many(models, lock)
    assert all(same_state(state(model), b) for model, b in zip(models, before, strict=True))
    want = [expected_biases(model, lock, 6.0) for model in models[:2]]
    receipts = fastlock.relock_many(models[:2], lock)
    assert all(same_biases(biases(model), w) for model, w in zip(models, want, strict=False))
    assert len({receipt.biases_digest for receipt in receipts}) == 2
    assert fastlock.relock_many([], lock) == []
    with pytest.raises(fastlock.FastlockError, match="twice"):
        fastlock.relock_many([models[0], models[0]], lock)


@pytest.mark.parametrize("locked_before", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_error_part_way_leaves_the_model_as_it_was(model_type: str, locked_before: bool, monkeypatch) -> None:
    """Fail after each single bias that is put in or taken out."""
    module = sys.modules["fastlock.models.placing"]
    steps = 3 + (2 if locked_before else 0)
    for failing in range(steps):
        model = tiny_model(model_type)
        lock = random_lock(model, [(0, 1), (1, 2), (2, 0)])
        if locked_before:
            fastlock.relock(model, random_lock(model, seed=8), 1.0)
        before, cls, done = state(model), type(model), 0

        def failing_late(step, failing=failing):
            def run(*args):
                nonlocal done
                step(*args)
                done += 1
                if done > failing:
                    raise MemoryError

            return run

        with monkeypatch.context() as patch:
            patch.setattr(module, "_place", failing_late(module._place))
            patch.setattr(module, "_restore", failing_late(module._restore))
            with pytest.raises(MemoryError):
                fastlock.relock(model, lock)
        assert same_state(state(model), before)
        assert type(model) is cls
        want = expected_biases(tiny_model(model_type), lock, 6.0)
        fastlock.relock(model, lock)
        assert same_biases(biases(model), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_finite_is_told_from_what_is_not(dtype: torch.dtype) -> None:
    """One check of all folds at once; numbers whose sum overflows are finite, infinities that cancel out are not."""
    huge = torch.finfo(dtype).max
    folds = [torch.full((300,), huge, dtype=dtype), torch.zeros(7, dtype=dtype), torch.ones(1, dtype=dtype)]
    assert fold_module._bad(folds) == [False, False, False]
    for bad in (math.inf, -math.inf, math.nan):
        folds[1][3] = bad
        assert fold_module._bad(folds) == [False, True, False]
    folds[1][3], folds[1][4] = math.inf, -math.inf
    assert fold_module._bad(folds) == [False, True, False]


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    lock, o_proj = random_lock(model), model.model.layers[2].self_attn.o_proj
    o_proj.weight.data[3, 2 * 32 + 5] = float("nan")
    before = state(model)
    with pytest.raises(fastlock.DamagedError, match=r"layers\.2\.self_attn\.o_proj.*not finite"):
        fastlock.relock(model, lock)
    assert same_state(state(model), before)
    o_proj.weight.data[3] = 0.5
    o_proj.weight.data[3, 0] = float("nan")  # not a locked column
    fastlock.relock(model, lock)


def test_a_strength_too_large_for_the_dtype_is_refused() -> None:
    model = tiny_model("llama", torch.float16)
    with pytest.raises(fastlock.FastlockError, match=r"float16: the strength is too large") as error:
        fastlock.relock(model, random_lock(model), 1e6)
    assert type(error.value) is fastlock.FastlockError, "the strength is to blame, and no weight"


def test_a_bias_that_is_not_finite_is_refused() -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        sites(model)[0].bias[3] = math.nan
    before = state(model)
    with pytest.raises(fastlock.DamagedError, match=r"layers\.0\.self_attn\.out_proj: .*its bias holds NaN"):
        fastlock.relock(model, random_lock(model))
    assert same_state(state(model), before)


def test_without_a_strength_the_lock_has_its_own_or_else_the_papers() -> None:
    lock = random_lock(tiny_model("llama"))
    for calibrated, expected in ((None, 6.0), (0.75, 0.75)):
        model, other = tiny_model("llama"), tiny_model("llama")
        assert fastlock.relock(model, dataclasses.replace(lock, strength=calibrated)).strength == expected
        fastlock.relock(other, lock, expected)
        assert same_state(state(model), state(other))


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "much", [6]])
def test_strengths_that_are_none(strength: object) -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(fastlock.FastlockError, match="strength"):
        fastlock.relock(model, random_lock(model), strength)
    assert same_state(state(model), before)


def test_strength_zero_is_the_unlocked_model() -> None:
    model = tiny_model("llama")
    ids = tokens()
    plain = logits(model, ids)
    fastlock.relock(model, random_lock(model), 0.0)
    assert torch.equal(logits(model, ids), plain)


def test_a_lock_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    for changes, message in [
        ({"num_layers": 5}, "num_layers 5.*has 3"),
        ({"num_heads": 8}, "num_heads 8.*has 4"),
        ({"hidden_size": 4096}, "hidden_size 4096.*has 64"),
        ({"rows": [(0, 4)]}, "row 0 is layer 0, head 4"),
        ({"rows": [(0, 1), (3, 0)]}, "row 1 is layer 3, head 0"),
    ]:
        with pytest.raises(fastlock.MismatchError, match=message):
            fastlock.relock(model, random_lock(model, **changes))
    other = random_lock(tiny_model("gpt2"))
    with pytest.raises(fastlock.MismatchError, match="head_dim 16.*has 32"):
        fastlock.relock(model, other)
    with pytest.raises(fastlock.FastlockError, match="Lock.load"):
        fastlock.relock(model, "some.safelock")


def test_unlocking_what_is_not_locked_is_an_error() -> None:
    with pytest.raises(fastlock.FastlockError, match="not relocked"):
        fastlock.unlock(tiny_model("llama"))


def test_not_a_transformers_model() -> None:
    with pytest.raises(fastlock.UnsupportedError, match="not a transformers model"):
        fastlock.relock(nn.Linear(4, 4), random_lock(tiny_model("llama")))


def test_tied_embeddings() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.tie_weights()
    lock, before = random_lock(model), state(model)
    fastlock.relock(model, lock)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_output_projections_tied_by_weight_are_locked_apart() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    fastlock.relock(model, random_lock(model, [(0, 1)]))
    assert layers[0].self_attn.o_proj.bias is not None
    assert layers[1].self_attn.o_proj.bias is None


def test_output_projections_that_are_one_module_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    with pytest.raises(fastlock.UnsupportedError, match="are one module"):
        fastlock.relock(model, random_lock(model, [(1, 1)]))
    fastlock.relock(model, random_lock(model, [(2, 1)]))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("frozen", [True, False])
def test_requires_grad_stays_as_it_was(model_type: str, frozen: bool) -> None:
    model = tiny_model(model_type).requires_grad_(not frozen)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    fastlock.relock(model, random_lock(model))
    now = dict(model.named_parameters())
    assert {name: now[name].requires_grad for name in before} == before
    assert {name: id(now[name]) for name in before} == ids, "an optimizer's parameters must stay its parameters"
    assert not any(now[name].requires_grad for name in now.keys() - before.keys())
    fastlock.unlock(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids


def test_a_relocked_model_can_be_fine_tuned_and_verify_then_says_so() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    fastlock.relock(model, lock)
    before = biases(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert same_biases(biases(model), before), "the lock's own biases are not trained"
    found = fastlock.verify(model, lock)
    assert (found.state, found.altered) == ("altered", (0, 2))
    fastlock.relock(model, lock)
    assert fastlock.verify(model, lock)


def test_a_bias_that_was_trained_after_relocking_is_not_thrown_away() -> None:
    model = tiny_model("opt")
    lock = random_lock(model)
    fastlock.relock(model, lock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    trained = state(model)
    for change in (lambda: fastlock.unlock(model), lambda: fastlock.relock(model, lock, 1.0)):
        with pytest.raises(fastlock.DamagedError, match="changed since"):
            change()
        assert same_state(state(model), trained)


def test_torch_compile_sees_the_lock_come_and_go() -> None:
    model = tiny_model("llama")
    lock, ids = random_lock(model), tokens()
    plain = logits(model, ids)
    with unfolded.unfolded(model, lock):
        expected = logits(model, ids)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, ids), plain)
    fastlock.relock(compiled, lock)
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-4, atol=1e-4)
    assert fastlock.verify(compiled, lock)
    fastlock.unlock(compiled)
    torch.testing.assert_close(logits(compiled, ids), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_inference_mode(model_type: str) -> None:
    with torch.inference_mode():
        made_inside = tiny_model(model_type)
    made_outside = tiny_model(model_type)
    lock, ids = random_lock(made_outside), tokens()
    fastlock.relock(made_outside, lock)
    expected, locked = logits(made_outside, ids), biases(made_outside)
    fastlock.unlock(made_outside)
    for model in (made_inside, made_outside):
        before = state(model)
        with torch.inference_mode():
            fastlock.relock(model, lock)
        assert torch.equal(logits(model, ids), expected)
        fastlock.unlock(model)
        assert same_state(state(model), before)
        fastlock.relock(model, lock)
        assert same_biases(biases(model), locked)
        with torch.inference_mode():
            fastlock.unlock(model)
        assert same_state(state(model), before)
    with torch.inference_mode():
        fastlock.relock(made_outside, lock)
    made_outside(ids, labels=ids).loss.backward()  # nothing made in inference mode stays behind


def test_the_meta_device_is_refused() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(fastlock.UnsupportedError, match="meta device"):
        fastlock.relock(model, random_lock(tiny_model("llama")))


def test_a_device_map_on_one_device_works(tmp_path) -> None:
    model = tiny_model("llama")
    lock, ids = random_lock(model), tokens()
    with unfolded.unfolded(model, lock):
        expected = logits(model, ids)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    fastlock.relock(model, lock)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_offloaded_layers_are_refused_where_they_are_locked(tmp_path) -> None:
    model = tiny_model("llama")
    ids = tokens()
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path / "offload"))
    plain = logits(model, ids)
    with pytest.raises(fastlock.UnsupportedError, match=r"layers\.2\.self_attn\.o_proj has no weights in memory"):
        fastlock.relock(model, random_lock(model))
    assert torch.equal(logits(model, ids), plain)
    lock = random_lock(model, [(0, 1), (1, 3)])
    fastlock.relock(model, lock)
    assert not torch.equal(logits(model, ids), plain)
    with pytest.raises(fastlock.UnsupportedError, match="offloaded"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cpu_offload_is_refused() -> None:
    model = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(fastlock.UnsupportedError, match="no weights in memory"):
        fastlock.relock(model, random_lock(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_on_several_devices() -> None:
    model = tiny_model("llama", torch.bfloat16)
    lock = random_lock(model)
    want = expected_biases(model, lock, 6.0)
    model.model.layers[0].to("cuda")
    fastlock.relock(model, lock)
    assert [site.bias.device.type for site in sites(model) if site.bias is not None] == ["cuda", "cpu"]
    for layer, bias in biases(model).items():
        if bias is not None:
            torch.testing.assert_close(bias.cpu(), want[layer], rtol=2**-7, atol=0)


def test_layers_on_several_devices_are_folded_by_device(monkeypatch) -> None:
    """Without a second device: the grouping is by the device that each weight reports."""
    model = tiny_model("llama")
    lock = random_lock(model, [(0, 1), (1, 2), (2, 3)])
    want = expected_biases(model, lock, 6.0)
    calls = []

    class Recorded(fold_module._ByReference):
        def start(self) -> None:
            calls.append(len(self.results))
            super().start()

    last = model.model.layers[2].self_attn.o_proj.weight
    groups = fold_module._group
    monkeypatch.setattr(
        fold_module,
        "_group",
        lambda f: ("second", *groups(f)[1:]) if f.columns.matrix.data_ptr() == last.data_ptr() else groups(f),
    )
    monkeypatch.setattr(fold_module, "_ByReference", Recorded)
    fastlock.relock(model, lock)
    assert calls == [2, 1]
    assert same_biases(biases(model), want)


class FakeQuantised(nn.Linear):
    """As bitsandbytes and others do: a subclass of nn.Linear that computes something else."""


def test_quantised_layers_are_refused() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    plain = attention.o_proj
    attention.o_proj = FakeQuantised(128, 64, bias=False)
    with pytest.raises(fastlock.UnsupportedError, match="not a plain linear layer.*unquantised"):
        fastlock.relock(model, random_lock(model))
    attention.o_proj = plain
    plain.weight = nn.Parameter((plain.weight.detach() * 10).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(fastlock.UnsupportedError, match="float8_e4m3fn"):
        fastlock.relock(model, random_lock(model))
    plain.weight = nn.Parameter(torch.randint(-8, 8, (64, 128), dtype=torch.int8), requires_grad=False)
    with pytest.raises(fastlock.UnsupportedError, match="int8"):
        fastlock.relock(model, random_lock(model))


class Subclassed(torch.Tensor):
    """As DTensor and torchao do."""


def test_tensor_subclasses_are_refused() -> None:
    model = tiny_model("llama")
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.weight = nn.Parameter(o_proj.weight.detach().as_subclass(Subclassed))
    with pytest.raises(fastlock.UnsupportedError, match="not a plain tensor"):
        fastlock.relock(model, random_lock(model))


def test_adapters_are_refused() -> None:
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(fastlock.UnsupportedError, match="Merge them first"):
        fastlock.relock(model, random_lock(model))


def test_a_config_that_disagrees_with_the_weights_is_refused() -> None:
    model = tiny_model("llama")
    model.config.head_dim = 16
    with pytest.raises(fastlock.DamagedError, match="do not belong together"):
        fastlock.relock(model, random_lock(model))


def test_layers_of_foreign_code_are_refused() -> None:
    model = tiny_model("llama")
    layer = type(model.model.layers[0])
    foreign = type("LlamaDecoderLayer", (layer,), {"__module__": "transformers_modules.some.remote.code"})
    model.model.layers[1].__class__ = foreign
    with pytest.raises(fastlock.UnsupportedError, match="not from transformers"):
        fastlock.relock(model, random_lock(model))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_deepcopy_and_pickle_take_the_lock_along(model_type: str, tmp_path) -> None:
    model = tiny_model(model_type)
    lock, before, ids = random_lock(model), state(model), tokens()
    fastlock.relock(model, lock)
    expected = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin, ids), expected)
        assert fastlock.verify(twin, lock)
        twin.save_pretrained(tmp_path / str(id(twin)))
        assert fastlock.verify(tmp_path / str(id(twin)), lock)
        fastlock.unlock(twin)
        assert same_state(state(twin), before)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_moving_a_relocked_model_moves_what_was_there_before(model_type: str) -> None:
    model, plain = tiny_model(model_type), tiny_model(model_type)
    fastlock.relock(model, random_lock(model))
    model.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    fastlock.unlock(model)
    assert same_state(state(model), state(plain))


def test_weights_on_other_strides() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    want = expected_biases(model, lock, 6.0)
    for layer in model.model.layers:
        o_proj = layer.self_attn.o_proj
        wide = torch.full((64, 128 + 24), float("nan"))
        wide[:, :128] = o_proj.weight.detach()
        o_proj.weight = nn.Parameter(wide[:, :128])
    fastlock.relock(model, lock)
    assert same_biases(biases(model), want)


def test_relocking_imports_nothing_that_it_does_not_need() -> None:
    """The names are looked up when they are first used: importing fastlock alone would show nothing."""
    code = (
        "import sys, torch, fastlock; fastlock.relock, fastlock.Plan, fastlock.Lock, fastlock.RequestLocks; "
        "print([m for m in ('triton', 'transformers', 'ray', 'sklearn', 'rich') if m in sys.modules])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout == "[]\n", out.stdout


def test_another_default_device_changes_nothing(tmp_path) -> None:
    """As `torch.set_default_device("cuda")` does: what fastlock makes for itself is on the CPU all the same."""
    model = tiny_model("gpt2")
    lock, before = random_lock(model), state(model)
    fastlock.relock(model, lock)
    expected = biases(model)
    fastlock.unlock(model)
    lock.save(tmp_path / "lock.safetensors")
    with torch.device("meta"):
        loaded = fastlock.Lock.load(tmp_path / "lock.safetensors")
        assert loaded == fastlock.Lock(lock.layers.tolist(), lock.heads.tolist(), lock.directions, lock.scales.tolist())
        fastlock.relock(model, loaded)
        assert fastlock.verify(model, loaded)
        assert same_biases(biases(model), expected)
        fastlock.unlock(model)
    assert same_state(state(model), before)


def test_the_inner_model_is_neither_relocked_nor_saved_alone(tmp_path) -> None:
    """Both would lose the lock in silence: the whole model's saving goes by its own record."""
    model = tiny_model("llama")
    lock = random_lock(model)
    with pytest.raises(fastlock.FastlockError, match="inner part of a language model"):
        fastlock.relock(model.model, lock)
    fastlock.relock(model, lock)
    with pytest.raises(fastlock.FastlockError, match="inner part of a relocked model"):
        model.model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    twin = copy.deepcopy(model)
    with pytest.raises(fastlock.FastlockError, match="inner part of a relocked model"):
        twin.model.save_pretrained(tmp_path / "out")
    fastlock.unlock(model)
    model.model.save_pretrained(tmp_path / "out")
    assert type(model.model).__mro__[0].__module__.startswith("transformers.")


def test_a_model_that_shares_its_layers_with_a_relocked_one_is_refused() -> None:
    a, b = tiny_model("llama"), tiny_model("llama", seed=5)
    b.model.layers = a.model.layers
    lock = random_lock(a)
    for models in ([a, b], [b, a]):
        with pytest.raises(fastlock.FastlockError, match="part of another model too"):
            fastlock.relock_many(models, lock)
    fastlock.relock(a, lock)
    before = state(a)
    with pytest.raises(fastlock.FastlockError, match="part of another model too"):
        fastlock.relock(b, lock)
    assert same_state(state(a), before)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_training_of_a_copy_is_not_thrown_away(model_type: str) -> None:
    model = tiny_model(model_type)
    lock = random_lock(model)
    fastlock.relock(model, lock)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        sites(twin)[0].bias.data.add_(0.5)
    trained = state(twin)
    with pytest.raises(fastlock.DamagedError, match="changed since"):
        fastlock.unlock(twin)
    assert same_state(state(twin), trained)
    model.load_state_dict(model.state_dict())  # the same values again are no change
    fastlock.unlock(model)


@pytest.mark.parametrize("earlier", [False, True])
def test_training_inside_relocked_is_not_thrown_away(earlier: bool) -> None:
    model = tiny_model("gpt2")
    lock = random_lock(model)
    if earlier:
        fastlock.relock(model, lock, 1.0)
    with pytest.raises(fastlock.DamagedError, match="changed since"), fastlock.relocked(model, lock), torch.no_grad():
        sites(model)[0].bias.add_(0.5)


def test_changing_the_dtype_inside_relocked() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    lock = random_lock(model)
    for each in (model, plain):
        fastlock.relock(each, lock, 1.0)
    with fastlock.relocked(model, lock, 2.0):
        model.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    assert same_state(state(model), state(plain))
    logits(model, tokens())


@pytest.mark.parametrize("models", [None, 3, tiny_model])
def test_models_that_are_no_list(models: object) -> None:
    with pytest.raises(fastlock.FastlockError, match="list of models"):
        fastlock.relock_many(models, random_lock(tiny_model("llama")))


@pytest.mark.parametrize("misuse", [lambda m: fastlock.verify(m, "a.safelock"), lambda m: fastlock.Lock.load(None)])
def test_misuse_is_told_kindly(misuse) -> None:
    with pytest.raises(fastlock.FastlockError, match="Lock.load|path"):
        misuse(tiny_model("llama"))


def test_further_layers_that_are_refused() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].self_attn.o_proj = layers[0].self_attn.o_proj
    with pytest.raises(fastlock.UnsupportedError, match="are one module"):
        fastlock.relock(model, random_lock(model, [(0, 1)]))
    model = tiny_model("opt")
    out_proj = model.model.decoder.layers[0].self_attn.out_proj
    out_proj.bias.data = out_proj.bias.data.double()
    with pytest.raises(fastlock.UnsupportedError, match="bias is torch.float64"):
        fastlock.relock(model, random_lock(model))
    model = tiny_model("llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(fastlock.UnsupportedError, match="found 0 lists of 2 layers"):
        fastlock.relock(model, random_lock(model))
    model = tiny_model("llama")
    model.get_base_model = lambda: model
    with pytest.raises(fastlock.UnsupportedError, match="Merge them first"):
        fastlock.relock(model, random_lock(model))


def test_a_receipt_notices_replaced_tensors() -> None:
    model = tiny_model("llama")
    for change in ("weight", "bias"):
        receipt = fastlock.relock(model, random_lock(model))
        o_proj = model.model.layers[0].self_attn.o_proj
        setattr(o_proj, change, nn.Parameter(getattr(o_proj, change).detach().clone(), requires_grad=False))
        with pytest.raises(fastlock.FastlockError, match="changed since"):
            receipt.to_dict()
