"""Models with PEFT adapters, relocked in memory: as their own layers compute, and never saved without the lock."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import KasaConfig
from torch import nn

import fastlock
from fastlock.models.unfolded import unfolded
from tests.helpers.adapters import adapted, config_of, layer_of, randomise, shift
from tests.helpers.families import logits, random_lock, reload, same_state, state, tiny_model, tokens

STRENGTH = 6.0
# The rest of PEFT's methods go the way of these: a copy of their layer is run.
FOLDED = (
    "lora",
    "rslora",
    "patterns",
    "dora",
    "bdlora",
    "elsewhere",
    "modules to save",
    "vera",
    "loha",
    "oft",
    "ia3 of the output",
    "ia3 of the input",
    "road",
    "randlora",
    "adalora",
)
REFUSED_KINDS = {"ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"}


def model_with(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return adapted(config_of(kind, **changes), tiny_model("llama")).to(dtype)


def lock_of(model: Any) -> fastlock.Lock:
    return random_lock(model.get_base_model())


def with_d_added(model: Any, lock: fastlock.Lock) -> torch.Tensor:
    """The logits with the displacement added where each adapted projection begins."""
    hooks = []
    for layer, displacement in lock.displacement(STRENGTH).items():
        d = displacement.dense(128)
        hook = layer_of(model, layer).register_forward_pre_hook(lambda _, args, d=d: (args[0] + d, *args[1:]))
        hooks.append(hook)
    result = logits(model, tokens())
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("kind", FOLDED)
def test_relocks_as_its_own_layers_compute(kind: str) -> None:
    model = model_with(kind)
    lock, untouched = lock_of(model), state(model)
    expected, before = with_d_added(model, lock), logits(model, tokens())
    shifts = {n: shift(layer_of(model, n), d.dense(128)) for n, d in lock.displacement(STRENGTH).items()}
    with unfolded(model, lock, STRENGTH):
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-9)
    zero = torch.zeros(1, 1, 128, dtype=torch.float64)
    outputs = {layer: layer_of(model, layer)(zero)[0, 0] for layer in shifts}
    receipt = fastlock.relock(model, lock, STRENGTH)
    for layer, f in shifts.items():
        got = layer_of(model, layer)(zero)[0, 0] - outputs[layer]
        torch.testing.assert_close(got, f, rtol=0, atol=1e-12 * float(f.abs().max()))
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-6)
    assert float((expected - before).abs().max()) > 1
    assert receipt.layers == (0, 2)
    assert fastlock.verify(model, lock).state == "locked"
    fastlock.unlock(model)
    assert same_state(state(model), untouched)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3 of the output", "elsewhere", "modules to save"])
def test_rounds_once_to_the_dtype_of_the_base(kind: str) -> None:
    model = model_with(kind, torch.bfloat16)
    lock, exact = lock_of(model), copy.deepcopy(model).double()
    fastlock.relock(model, lock, STRENGTH)
    for n, displacement in lock.displacement(STRENGTH).items():
        layer, d = layer_of(model, n), displacement.dense(128)
        inside = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        inside = layer.modules_to_save["default"] if hasattr(layer, "modules_to_save") else inside
        f = shift(layer_of(exact, n), d)
        if kind == "ia3 of the output":
            f = exact.get_submodule(f"base_model.model.model.layers.{n}.self_attn.o_proj").get_base_layer().weight @ d
        assert inside.bias.dtype == torch.bfloat16
        assert torch.equal(inside.bias, f.float().bfloat16())
    assert fastlock.verify(model, lock)


@pytest.mark.parametrize("kind", ["lora", "loha", "ia3 of the output"])
def test_what_peft_does_afterwards_is_noticed(kind: str) -> None:
    """Another adapter, or none: the bias is that of the one that was active."""
    model = model_with(kind)
    lock = lock_of(model)
    model.add_adapter("other", config_of(kind))
    randomise(model, 8)
    fastlock.relock(model, lock, STRENGTH)
    scaled = kind == "ia3 of the output"  # there the base's own fold is in the bias, whichever adapter acts
    with model.disable_adapter():
        assert fastlock.verify(model, lock).state == ("locked" if scaled else "altered")
    model.set_adapter("other")
    assert fastlock.verify(model, lock).state == ("locked" if scaled else "altered")
    if not scaled:
        fastlock.relock(model, lock, STRENGTH)
    torch.testing.assert_close(logits(model, tokens()), _unlocked(model, lock), rtol=0, atol=1e-6)
    model.set_adapter("default")
    assert fastlock.verify(model, lock).state == ("locked" if scaled else "altered")


def _unlocked(model: Any, lock: fastlock.Lock) -> torch.Tensor:
    """The logits of an unlocked copy of the model with the displacement added."""
    fresh = copy.deepcopy(model)
    fastlock.unlock(fresh)
    return with_d_added(fresh, lock)


@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "ia3 of the output"])
def test_merged_before_or_after_it_is_the_same(kind: str) -> None:
    model = model_with(kind)
    lock = lock_of(model)
    expected = with_d_added(model, lock)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    fastlock.relock(merged, lock, STRENGTH)
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=1e-6)
    fastlock.relock(model, lock, STRENGTH)
    whole = model.merge_and_unload()
    torch.testing.assert_close(logits(whole, tokens()), expected, rtol=0, atol=1e-6)


def test_several_adapters_at_once() -> None:
    model = model_with("lora")
    model.add_adapter("other", config_of("rslora"))
    model.base_model.set_adapter(["default", "other"])
    randomise(model, 8)
    lock = lock_of(model)
    expected = with_d_added(model, lock)
    fastlock.relock(model, lock, STRENGTH)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-6)


def test_disabled_adapters_do_not_count() -> None:
    model = model_with("loha")
    lock = lock_of(model)
    with model.disable_adapter():
        expected = with_d_added(model, lock)
        fastlock.relock(model, lock, STRENGTH)
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-6)


def test_dropout_does_not_count() -> None:
    model = model_with("lora", lora_dropout=0.5)
    lock = lock_of(model)
    expected = with_d_added(model, lock)
    model.train()
    fastlock.relock(model, lock, STRENGTH)
    torch.testing.assert_close(logits(model.eval(), tokens()), expected, rtol=0, atol=1e-6)


def test_prompts_in_front() -> None:
    """At the positions that they add, too, the displacement is there."""
    for cls in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(tiny_model("llama"), cls(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        lock, hooks = lock_of(model), []
        for n, displacement in lock.displacement(STRENGTH).items():
            d = displacement.dense(128).float()
            hook = layer_of(model, n).register_forward_pre_hook(lambda _, args, d=d: (args[0] + d, *args[1:]))
            hooks.append(hook)
        expected = logits(model, tokens())
        for hook in hooks:
            hook.remove()
        fastlock.relock(model, lock, STRENGTH)
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "elsewhere", "modules to save"])
def test_saving_the_adapters_alone_is_refused(kind: str, tmp_path: Path) -> None:
    model = model_with(kind)
    fastlock.relock(model, lock_of(model))
    for wrapper in (model, copy.deepcopy(model)):
        with pytest.raises(fastlock.FastlockError, match=r"it would be lost.*fastlock relock ADAPTER --base BASE"):
            wrapper.save_pretrained(tmp_path / "adapter")
    with pytest.raises(fastlock.FastlockError, match="saved"):
        model.get_base_model().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "adapter").exists()
    fastlock.unlock(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_relocked_for_the_time_of_a_block() -> None:
    model = model_with("lora")
    lock, before = lock_of(model), state(model)
    expected = with_d_added(model, lock)
    with fastlock.relocked(model, lock, STRENGTH):
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-6)
    assert same_state(state(model), before)


def test_adapters_put_on_a_model_that_is_relocked() -> None:
    inner = tiny_model("llama").double()
    lock = random_lock(inner)
    fastlock.relock(inner, lock, STRENGTH)
    model = adapted(config_of("lora"), inner).double()
    assert fastlock.verify(model, lock).state == "altered"
    fastlock.relock(model, lock, STRENGTH)
    torch.testing.assert_close(logits(model, tokens()), _unlocked(model, lock), rtol=0, atol=1e-6)
    assert fastlock.verify(model, lock)


def test_adapters_put_on_a_model_that_was_relocked_on_disk(tmp_path: Path) -> None:
    inner = tiny_model("llama")
    lock = random_lock(inner)
    fastlock.relock(inner, lock, STRENGTH)
    inner.save_pretrained(tmp_path)
    for kind, state_of_it in (("elsewhere", "locked"), ("lora", "altered")):
        model = adapted(config_of(kind), reload(tmp_path))
        assert fastlock.verify(model, lock).state == state_of_it
    with pytest.raises(fastlock.UnsupportedError, match="relocked on disk. Unlock the base before"):
        fastlock.relock(model, lock)


def test_quantised_bases_take_loras_alone() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for kind in ("lora", "loha"):
        inner = tiny_model("llama", torch.bfloat16)
        for layer in inner.model.layers:
            plain = layer.self_attn.o_proj
            packed = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
            packed.support_avx512bf16_for_cpu = False  # it would round its scales when it is run
            packed.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            layer.self_attn.o_proj = packed.to("cpu")
        if kind == "loha":  # which PEFT itself does not put on such layers
            continue
        model = adapted(config_of(kind), inner)
        lock = lock_of(model)
        layer = layer_of(model, 0)
        weight = bitsandbytes.functional.dequantize_4bit(
            layer.base_layer.weight.data, layer.base_layer.weight.quant_state
        )
        d = lock.displacement(STRENGTH)[0].dense(128)
        a, b = (getattr(layer, name)["default"].weight.detach().double() for name in ("lora_A", "lora_B"))
        f = weight.double() @ d + 3 * (b @ (a @ d))
        fastlock.relock(model, lock, STRENGTH)
        assert torch.equal(layer.base_layer.bias, f.float().bfloat16())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alora_invocation_tokens": [5]}, "ALoraLinearVariant"),
        ({"kasa_config": KasaConfig()}, None),
        ({"init_lora_weights": "pissa"}, None),
    ],
    ids=["alora", "kasa", "pissa"],
)
def test_what_rewrote_its_base_is_what_it_is(changes: dict[str, Any], says: str | None) -> None:
    """In memory W is what it is now; on disk it is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_with("lora", task_type="CAUSAL_LM", **changes)
    lock = lock_of(model)
    if says is None:
        expected = with_d_added(model, lock)
        fastlock.relock(model, lock, STRENGTH)
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-6)
        return
    before = state(model)
    with pytest.raises(fastlock.UnsupportedError, match=says):
        fastlock.relock(model, lock, STRENGTH)
    assert same_state(state(model), before)


def test_a_layer_that_depends_on_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("loha")
    forward = type(layer_of(model, 0)).forward
    monkeypatch.setattr(
        type(layer_of(model, 0)), "forward", lambda self, x: forward(self, x) * x.norm(dim=-1)[..., None]
    )
    before = state(model)
    with pytest.raises(fastlock.UnsupportedError, match="layers.0.self_attn.o_proj.*not affine"):
        fastlock.relock(model, lock_of(model))
    assert same_state(state(model), before)


def test_a_layer_that_cannot_be_run_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("loha")

    def forward(*_: Any, **__: Any) -> torch.Tensor:
        raise KeyError("task_ids")

    monkeypatch.setattr(type(layer_of(model, 0)), "forward", forward)
    with pytest.raises(fastlock.UnsupportedError, match="cannot be evaluated by itself.*task_ids"):
        fastlock.relock(model, lock_of(model))


def test_a_layer_that_treats_a_bias_in_a_way_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("loha")
    forward = type(layer_of(model, 0)).forward

    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        bias = self.base_layer.bias
        return forward(self, x) + (0 if bias is None else bias)

    monkeypatch.setattr(type(layer_of(model, 0)), "forward", doubled)
    with pytest.raises(fastlock.UnsupportedError, match="treats a bias of its base"):
        fastlock.relock(model, lock_of(model))


def test_a_forward_pass_that_was_replaced_is_refused() -> None:
    model = model_with("lora")
    layer = layer_of(model, 0)
    layer.forward = layer.forward
    with pytest.raises(fastlock.UnsupportedError, match="was replaced"):
        fastlock.relock(model, lock_of(model))


@pytest.mark.parametrize("kind", sorted(REFUSED_KINDS))
def test_methods_that_act_elsewhere_too_are_refused(kind: str) -> None:
    model = model_with("elsewhere")
    model.peft_config["default"].peft_type = kind
    with pytest.raises(fastlock.UnsupportedError, match=f"method {kind}"):
        fastlock.relock(model, lock_of(model))


def test_what_an_adapter_does_to_columns_is_no_other_basis() -> None:
    model = model_with("bone")
    lock = lock_of(model)
    weights = {layer: layer_of(model, layer).get_base_layer().weight.detach().view(64, 4, 32) for layer in (0, 2)}
    rows = zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)
    norms = torch.stack([weights[layer][:, head].norm(dim=0) for layer, head in rows]).float()
    inner = model.get_base_model()
    fastlock.relock(model, replace(lock, column_norms=norms))
    fastlock.unlock(model)
    of_head = torch.exp(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(fastlock.UnsupportedError):
        fastlock.relock(inner, replace(lock, column_norms=norms * of_head))


def test_locks_per_request_and_plans_are_refused() -> None:
    model = model_with("lora")
    lock = lock_of(model)
    with pytest.raises(fastlock.UnsupportedError, match="adapted"):
        fastlock.Plan([model], lock).relock()
    for wrapped in ("lora", "modules to save"):
        inner = model_with(wrapped).get_base_model()
        with pytest.raises(fastlock.UnsupportedError, match="plain linear layers alone"):
            fastlock.RequestLocks(inner, [lock])


def test_extraction_and_training_still_ask_for_a_whole_model() -> None:
    model = model_with("elsewhere")
    with pytest.raises(fastlock.UnsupportedError, match="pass the model inside"):
        fastlock.RequestLocks(model, [lock_of(model)])
    assert isinstance(model, nn.Module)
