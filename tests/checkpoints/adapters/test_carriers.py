"""Adapters relocked on disk: in every carrier the lock acts as d does in the forward pass, and comes out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.checkpoints.adapters.folding import BasePart
from tests.helpers.adapters import config_of, loaded, save_adapter
from tests.helpers.families import logits, tokens
from tests.helpers.relocked_adapters import adapted_logits, contents, displaced_logits

HERE = {"stacks": ["transformers"]}
SOME_LAYERS = {"layers_to_transform": [0], "target_modules": ["o_proj", "q_proj"]}
PATTERN = {
    "target_modules": r"model\.layers\.(0\.self_attn\.o_proj|\d\.mlp\.up_proj)",
    "exclude_modules": ["2.self_attn.o_proj"],
}


@pytest.fixture(scope="session")
def lock(part: BasePart) -> fastlock.Lock:
    return part.lock


# The adapter, what is asked for, and what carries it.
CARRIED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("elsewhere", {}, {}, "base bias"),
    ("ia3 of the output", {}, HERE, "base bias"),
    ("road", {}, HERE, "base bias"),
    ("lora", {}, HERE, "adapter bias"),
    ("lora bias", {}, HERE, "adapter bias"),
    ("rslora", {"init_lora_weights": "gaussian"}, HERE, "adapter bias"),
    ("patterns", {}, HERE, "adapter bias"),
    ("elsewhere", {}, {"carrier": "adapter bias", **HERE}, "adapter bias"),
    ("lora", SOME_LAYERS, HERE, "adapter bias"),
    ("rslora", PATTERN, HERE, "adapter bias"),
    ("patterns", {}, {}, "merge"),
    ("modules to save", {}, {}, "merge"),
]


@pytest.mark.parametrize(("kind", "changes", "asked", "carrier"), CARRIED, ids=lambda value: str(value)[:24])
def test_acts_as_with_d_added_and_comes_out_again(
    kind: str, changes: dict[str, Any], asked: dict[str, Any], carrier: str, base: Path, lock, tmp_path: Path
) -> None:
    source = save_adapter(config_of(kind, **changes), tmp_path / "adapter")
    before, out = contents(source), tmp_path / "out"
    receipt = fastlock.relock_adapter(source, base, lock, out, 3.0, relocked_base=tmp_path / "locked", **asked)
    assert (receipt.carrier, receipt.strength, receipt.lock_digest) == (carrier, 3.0, lock.digest)
    assert contents(source) == before
    truth, plain = displaced_logits(base, source, lock, 3.0), adapted_logits(base, source)
    if carrier == "merge":
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").double()
        acting = logits(model, tokens())
        assert fastlock.verify(out, lock).strength == 3.0
    else:
        acting = adapted_logits(Path(receipt.base.name), out)
        assert fastlock.verify(out, lock).strength == 3.0
        fastlock.unlock_checkpoint(out, tmp_path / "back")
        assert contents(tmp_path / "back") == before
    effect = (truth - plain).abs().max()
    assert effect > 0.1
    assert (acting - truth).abs().max() < 3e-6 * effect


def test_what_is_merged_may_be_as_large_as_what_it_replaces(
    base: Path, lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings that were trained, too, take more than any projection."""
    source = save_adapter(config_of("lora", modules_to_save=["embed_tokens"]), tmp_path / "adapter")
    monkeypatch.setattr("fastlock.checkpoints.adapters.adapter.MAX_TENSOR_BYTES", 4096)
    receipt = fastlock.relock_adapter(source, base, lock, tmp_path / "out", 3.0, carrier="merge")
    assert receipt.carrier == "merge"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    truth = displaced_logits(base, source, lock, 3.0)
    assert (logits(model.double(), tokens()) - truth).abs().max() < 3e-6 * truth.abs().max()


def test_a_relocked_base_serves_every_adapter_that_leaves_it_alone(base: Path, lock, tmp_path: Path) -> None:
    first, second = (save_adapter(config_of("elsewhere"), tmp_path / str(i), seed=i) for i in range(2))
    receipts = [
        fastlock.relock_adapter(source, base, lock, tmp_path / f"{source.name}-out") for source in (first, second)
    ]
    locked = tmp_path / "base-locked"
    assert [receipt.base.name for receipt in receipts] == [str(locked)] * 2
    assert fastlock.verify(locked, lock)
    named = fastlock.relock_adapter(second, locked, lock, tmp_path / "named")
    assert named == receipts[1]
    for source in (first, second):
        assert peft.PeftConfig.from_pretrained(tmp_path / f"{source.name}-out").base_model_name_or_path == str(locked)
    with pytest.raises(fastlock.FastlockError, match="is not this base relocked with this lock, at strength 2"):
        fastlock.relock_adapter(first, base, lock, tmp_path / "other", 2.0)


def test_the_adapter_bias_survives_every_way_of_loading(base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    out = tmp_path / "out"
    fastlock.relock_adapter(source, base, lock, out, **HERE)
    truth = displaced_logits(base, source, lock)

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")

    lean = peft.PeftModel.from_pretrained(fresh(), out, low_cpu_mem_usage=True).double().eval()
    added = peft.PeftModel.from_pretrained(fresh(), source, adapter_name="first")
    added.load_adapter(out, "second")
    added.set_adapter("second")
    loaded(base, out).float().save_pretrained(tmp_path / "again")
    for acting in (
        logits(lean, tokens()),
        logits(added.double().eval(), tokens()),
        adapted_logits(base, tmp_path / "again"),
    ):
        assert (acting - truth).abs().max() < 1e-5


def test_every_target_has_a_bias_and_the_rest_is_as_it_was(base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    receipt = fastlock.relock_adapter(source, base, lock, tmp_path / "out", **HERE)
    before = safetensors.torch.load_file(source / "adapter_model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(after.pop(key), tensor) for key, tensor in before.items())
    assert after.keys() == {key.replace("B.weight", "B.bias") for key in before if "lora_B" in key}
    nonzero = {key for key, tensor in after.items() if tensor.count_nonzero()}
    assert nonzero == {f"base_model.model.{site.name}.lora_B.bias" for site in receipt.sites}


def test_a_sidecar_holds_the_biases_beside_an_untouched_adapter(base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("dora"), tmp_path / "adapter")
    receipt = fastlock.relock_adapter(source, base, lock, tmp_path / "out", carrier="sidecar")
    after = contents(tmp_path / "out")
    biases = safetensors.torch.load(after.pop("fastlock.safetensors"))
    assert after.pop("fastlock.json")
    assert after == contents(source)
    model, plain = loaded(base, source), adapted_logits(base, source)
    hooks = []
    for site in receipt.sites:
        module = model.get_submodule(f"base_model.model.{site.name}")
        hooks.append(module.register_forward_hook(lambda _m, _a, y, b=biases[f"{site.name}.bias"]: y + b.to(y)))
    truth = displaced_logits(base, source, lock)
    assert (logits(model, tokens()) - truth).abs().max() < 1e-5 * (truth - plain).abs().max()
    assert fastlock.verify(tmp_path / "out", lock)


def test_a_relocked_adapter_is_relocked_anew_from_its_original(base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora bias"), tmp_path / "adapter")
    fastlock.relock_adapter(source, base, lock, tmp_path / "once", 5.0, **HERE)
    twice = fastlock.relock_adapter(tmp_path / "once", base, lock, tmp_path / "twice", 1.0, **HERE)
    assert twice == fastlock.relock_adapter(source, base, lock, tmp_path / "direct", 1.0, **HERE)
    assert contents(tmp_path / "twice") == contents(tmp_path / "direct")


def test_a_shared_fold_needs_a_bound_and_tells_how_far_it_is_off(base: Path, lock, tmp_path: Path) -> None:
    config = config_of("lora", lora_alpha=0.001)
    source, out = save_adapter(config, tmp_path / "adapter"), tmp_path / "out"
    with pytest.raises(
        fastlock.UnsupportedError, match=r"touches the locked projections of layers 0, 2.*--for"
    ) as error:
        fastlock.relock_adapter(source, base, lock, out, carrier="base bias")
    assert "transformers (adapter bias)" in str(error.value)
    with pytest.raises(fastlock.UnsupportedError, match="is off by .*, and 0.00% is allowed"):
        fastlock.relock_adapter(source, base, lock, out, gap=1e-9)
    receipt = fastlock.relock_adapter(source, base, lock, out, gap=0.02)
    assert (receipt.carrier, receipt.allowed_gap) == ("base bias", 0.02)
    truth, plain = displaced_logits(base, source, lock), adapted_logits(base, source)
    off = (adapted_logits(Path(receipt.base.name), out) - truth).abs().max() / (truth - plain).abs().max()
    gaps = [site.gap for site in receipt.sites if site.gap is not None]
    assert 0 < max(gaps) < 0.02
    assert off < 10 * max(gaps)
    assert "off by at most" in fastlock.verify(out, lock).reason


@pytest.mark.parametrize("kind", ["lora", "elsewhere"])
def test_what_could_be_loaded_without_the_lock_is_set_aside(kind: str, base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of(kind), tmp_path / "adapter")
    for name in (
        "adapter_model.bin",
        "checkpoint-5/adapter_model.safetensors",
        "model.sig",
        ".git/config",
        "notes/a.txt",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(name.encode())
    out = tmp_path / "out"
    fastlock.relock_adapter(source, base, lock, out, **HERE)
    beside = {name for name in contents(out) if not name.startswith("fastlock")}
    assert beside == {"README.md", "adapter_config.json", "adapter_model.safetensors", "notes/a.txt"}
    assert fastlock.verify(out, lock)
    fastlock.unlock_checkpoint(out, tmp_path / "back")
    before = contents(source)
    del before[".git/config"]
    assert contents(tmp_path / "back") == before


def test_a_relocked_base_is_for_the_stacks_that_it_was_relocked_for(base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("elsewhere"), tmp_path / "adapter")
    fastlock.relock_adapter(source, base, lock, tmp_path / "first", stacks=["vllm"])
    with pytest.raises(fastlock.FastlockError, match="for vllm and llama.cpp. Name another place"):
        fastlock.relock_adapter(source, base, lock, tmp_path / "out", stacks=["vllm", "llama.cpp"])
    with pytest.raises(fastlock.UnsupportedError, match="the base is not relocked for llama.cpp"):
        fastlock.relock_adapter(source, tmp_path / "base-locked", lock, tmp_path / "out", stacks=["llama.cpp"])
    with pytest.raises(fastlock.FastlockError, match="is relocked already. Leave out"):
        fastlock.relock_adapter(
            source, tmp_path / "base-locked", lock, tmp_path / "out", stacks=["vllm"], relocked_base=tmp_path / "else"
        )
    assert not (tmp_path / "out").exists()
