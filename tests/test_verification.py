"""Verification: what is locked, what is not, and what was altered."""

import base64
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.kernels.fold import reference
from fastlock.locks.receipt import biases_digest, raw_bytes
from fastlock.models.sites import sites
from tests.helpers.families import EAGER, gated_lock, random_lock, same_state, state, tiny_model

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_locked(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype)
    lock = random_lock(model)
    assert fastlock.verify(model, lock).state == "not locked"
    fastlock.relock(model, lock, 1.7)
    before = state(model)
    found = fastlock.verify(model, lock)
    assert found
    assert (found.state, found.strength, found.layers, found.altered) == ("locked", 1.7, (0, 2), ())
    assert same_state(state(model), before)
    assert json.dumps(found.to_dict())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_two_units_off_is_altered(dtype: torch.dtype) -> None:
    """float32 is summed in float32 by some paths, so that there more than one unit must be allowed."""
    model = tiny_model("llama", dtype)
    lock = random_lock(model)
    fastlock.relock(model, lock)
    bias = model.model.layers[2].self_attn.o_proj.bias
    units = 2 if dtype != torch.float32 else 2000
    with torch.no_grad():
        bias[7] += units * torch.finfo(dtype).eps * bias[7].abs()
    found = fastlock.verify(model, lock)
    assert (found.state, found.altered) == ("altered", (2,))
    assert not found


BROUGHT = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("written", "now"), BROUGHT, ids=str)
@pytest.mark.parametrize("parts", ["constant", "gate", "both"])
def test_a_lock_is_found_after_the_model_was_brought_to_another_dtype(
    parts: str, written: torch.dtype, now: torch.dtype
) -> None:
    """What was put in was rounded to the earlier dtype; eight units of the coarser one off, and it is altered."""
    model = tiny_model("opt", written)
    lock = random_lock(model) if parts == "constant" else gated_lock(model, constant=parts == "both")
    fastlock.relock(model, lock, 1.5)
    model.to(now)
    found = fastlock.verify(model, lock)
    assert (found.state, found.strength) == ("locked", 1.5)
    unit, projection = max(torch.finfo(dtype).eps for dtype in (written, now)), sites(model)[2].module
    with torch.no_grad():
        numbers = projection.bias if parts == "constant" else projection.weight[:, 2 * lock.head_dim]
        numbers += 8 * unit * numbers.abs().max()
    found = fastlock.verify(model, lock)
    assert (found.state, found.altered) == ("altered", (2,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_lock_is_found_in_a_checkpoint_that_is_loaded_in_another_dtype(tmp_path, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2", torch.bfloat16)
    lock = random_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path)
    assert fastlock.verify(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **EAGER), lock)


@pytest.mark.parametrize(("written", "now"), BROUGHT, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lock_is_found_where_a_model_of_another_dtype_was_saved(
    kind: str, written: torch.dtype, now: torch.dtype, tmp_path
) -> None:
    """Brought to it before it was saved, or loaded in it and saved by transformers alone; and loaded once more."""
    model = tiny_model(kind, written)
    lock = random_lock(model)
    fastlock.relock(model, lock, 1.5)
    model.save_pretrained(tmp_path / "as written")
    model.to(now).save_pretrained(tmp_path / "brought")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "as written", dtype=now, **EAGER)
    loaded.save_pretrained(tmp_path / "loaded")
    unit = max(torch.finfo(dtype).eps for dtype in (written, now))
    for way in ("brought", "loaded"):
        assert fastlock.verify(tmp_path / way, lock)
        for dtype in (written, now) if way == "brought" else (now,):
            assert fastlock.verify(AutoModelForCausalLM.from_pretrained(tmp_path / way, dtype=dtype, **EAGER), lock)
        name = f"{sites(model)[2].name}.bias"
        tensors = load_file(tmp_path / way / "model.safetensors")
        tensors[name] += 8 * unit * tensors[name].abs().max()
        save_file(tensors, tmp_path / way / "model.safetensors", metadata={"format": "pt"})
        found = fastlock.verify(tmp_path / way, lock)
        assert (found.state, found.altered) == ("altered", (2,))


def test_what_a_model_was_rounded_to_before_is_not_forgotten(tmp_path) -> None:
    """float32, saved in bfloat16, loaded and saved again in float32: its weights have been rounded since the fold."""
    model = tiny_model("gpt2", torch.float32)
    lock, before = random_lock(model), state(tiny_model("gpt2", torch.float32).to(torch.bfloat16))
    fastlock.relock(model, lock)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32, **EAGER)
    with fastlock.relocked(wide, random_lock(wide, seed=5)):
        pass
    wide.save_pretrained(tmp_path / "wide")
    assert fastlock.verify(tmp_path / "wide", lock)
    fastlock.unlock_checkpoint(tmp_path / "wide", tmp_path / "unlocked")
    unlocked = AutoModelForCausalLM.from_pretrained(tmp_path / "unlocked", dtype=torch.bfloat16, **EAGER)
    assert same_state(state(unlocked), before)


def test_altered_in_each_way() -> None:
    def weight(model: nn.Module) -> None:
        model.model.layers[0].self_attn.o_proj.weight[3, 1 * 32] += 0.5

    def other_columns(model: nn.Module) -> None:
        model.model.layers[0].self_attn.o_proj.weight[:, :32] += 0.5

    def bias_gone(model: nn.Module) -> None:
        model.model.layers[0].self_attn.o_proj.bias = None

    def bias_nan(model: nn.Module) -> None:
        model.model.layers[0].self_attn.o_proj.bias[0] = float("nan")

    for change, expected in [
        (weight, "altered"),
        (other_columns, "locked"),
        (bias_gone, "altered"),
        (bias_nan, "altered"),
    ]:
        model = tiny_model("llama")
        lock = random_lock(model)
        fastlock.relock(model, lock)
        with torch.no_grad():
            change(model)
        assert fastlock.verify(model, lock).state == expected, change.__name__


def test_another_lock_is_not_this_one() -> None:
    model = tiny_model("llama")
    fastlock.relock(model, random_lock(model))
    found = fastlock.verify(model, random_lock(model, seed=5))
    assert found.state == "not locked"
    assert "another lock" in found.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [0.7, 6.0, 1 / 3])
def test_without_a_receipt(dtype: torch.dtype, strength: float) -> None:
    """As the authors' scripts leave a model: a bias, and nothing that says so."""
    model = tiny_model("llama", dtype)
    lock = random_lock(model)
    displacements = lock.displacement(strength)
    for site in sites(model):
        if site.layer in displacements:
            site.module.bias = nn.Parameter(
                reference.fold(site.head_columns(displacements[site.layer].heads), displacements[site.layer].values)
            )
    found = fastlock.verify(model, lock)
    assert found
    assert found.strength == pytest.approx(strength, rel=2e-3)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.bias[0] *= 1.1
    assert fastlock.verify(model, lock).state == "not locked"


def test_biases_of_its_own_are_not_taken_for_a_lock() -> None:
    model = tiny_model("gpt2")
    found = fastlock.verify(model, random_lock(model))
    assert (found.state, found.strength) == ("not locked", None)


def test_directories(tmp_path) -> None:
    for kind in ("llama", "gpt2"):
        model = tiny_model(kind)
        lock = random_lock(model)
        model.save_pretrained(tmp_path / kind / "plain")
        fastlock.relock(model, lock, 2.0)
        model.save_pretrained(tmp_path / kind / "locked")
        assert fastlock.verify(tmp_path / kind / "plain", lock).state == "not locked"
        assert fastlock.verify(str(tmp_path / kind / "locked"), lock).strength == 2.0


def test_a_directory_whose_bias_was_altered_or_dropped(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama")
    lock = random_lock(model)
    fastlock.relock(model, lock)
    name = "model.layers.2.self_attn.o_proj.bias"
    for change in ("one bit", "dropped", "zero"):
        directory = tmp_path / change
        model.save_pretrained(directory)
        tensors = load_file(directory / "model.safetensors")
        if change == "one bit":
            tensors[name].view(torch.int32)[3] ^= 1
        elif change == "zero":
            tensors[name].zero_()
        else:
            del tensors[name]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        found = fastlock.verify(directory, lock)
        assert found.state == "altered", change


def test_a_directory_that_is_none(tmp_path) -> None:
    lock = random_lock(tiny_model("llama"))
    with pytest.raises(fastlock.FastlockError, match="no such directory"):
        fastlock.verify(tmp_path / "nowhere", lock)
    with pytest.raises(fastlock.FastlockError, match="holds no config.json"):
        fastlock.verify(tmp_path, lock)


def test_a_pickled_checkpoint_is_not_unpickled(tmp_path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    directory = tmp_path / "checkpoint"
    tiny_model("llama").config.save_pretrained(directory)
    torch.save({"model.embed_tokens.weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(fastlock.UnsupportedError, match="safetensors"):
        fastlock.verify(directory, random_lock(tiny_model("llama")))
    assert not marker.exists()


def test_strength_zero_is_not_locked() -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    fastlock.relock(model, lock, 0.0)
    assert (fastlock.verify(model, lock).state, bool(fastlock.verify(model, lock))) == ("not locked", False)


def test_an_infinite_bias_without_a_receipt() -> None:
    model = tiny_model("llama")
    sites(model)[0].module.bias = nn.Parameter(torch.full((64,), float("inf")))
    assert fastlock.verify(model, random_lock(model)).state == "not locked"


def relocked_on_disk(tmp_path, kind: str = "llama", strength: float = 2.5):
    model = tiny_model(kind, torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    lock = random_lock(model)
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out", strength, stacks=["transformers"])
    return lock, tmp_path / "out"


def rewrite_config(directory, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_on_disk_without_the_receipt(tmp_path) -> None:
    lock, out = relocked_on_disk(tmp_path)
    rewrite_config(out, fastlock=None)
    found = fastlock.verify(out, lock)
    assert (found.state, found.strength) == ("locked", 2.5)
    other = random_lock(tiny_model("llama"), rows=[(0, 0), (1, 1)], seed=5)
    assert fastlock.verify(out, other).state == "not locked"


def test_on_disk_with_the_bias_switched_off(tmp_path) -> None:
    """The numbers are all there, and every stack would drop them."""
    lock, out = relocked_on_disk(tmp_path)
    rewrite_config(out, attention_bias=False)
    found = fastlock.verify(out, lock)
    assert (found.state, found.altered) == ("altered", (0, 2))
    assert "does not set attention_bias, and without it transformers silently drops the biases" in found.reason


def test_on_disk_without_the_receipt_and_with_the_bias_switched_off(tmp_path) -> None:
    lock, out = relocked_on_disk(tmp_path)
    rewrite_config(out, fastlock=None, attention_bias=False)
    found = fastlock.verify(out, lock)
    assert (found.state, found.strength) == ("not locked", None)
    assert "transformers silently drops the biases" in found.reason


@pytest.mark.parametrize("stacks", [[], None, "vllm", {}, [7]])
def test_a_receipt_whose_stacks_are_no_list_of_names(stacks: object, tmp_path) -> None:
    lock, out = relocked_on_disk(tmp_path)
    receipt = json.loads((out / "config.json").read_text())["fastlock"]
    receipt["carrier"]["stacks"] = stacks
    rewrite_config(out, fastlock=receipt)
    with pytest.raises(fastlock.DamagedError, match="the receipt is damaged"):
        fastlock.verify(out, lock)


def test_a_receipt_that_names_no_stacks(tmp_path) -> None:
    """The bias is still looked for in transformers."""
    lock, out = relocked_on_disk(tmp_path)
    receipt = json.loads((out / "config.json").read_text())["fastlock"]
    del receipt["carrier"]["stacks"], receipt["carrier"]["config_digest"]
    rewrite_config(out, fastlock=receipt, attention_bias=False)
    found = fastlock.verify(out, lock)
    assert (found.state, found.altered) == ("altered", (0, 2))
    assert "does not set attention_bias" in found.reason


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_receipt_that_hides_the_lock_behind_biases_that_never_were(kind: str, tmp_path) -> None:
    """It says that the fold's negative was there before, so that zeros would be right."""
    lock, out = relocked_on_disk(tmp_path, kind)
    receipt = json.loads((out / "config.json").read_text())["fastlock"]
    tensors, originals = load_file(out / "model-fastlock.safetensors"), {}
    for site in receipt["sites"]:
        name, site["had_bias"] = f"{site['name']}.bias", True
        originals[str(site["layer"])] = base64.b64encode(raw_bytes(-tensors[name])).decode()
        tensors[name].zero_()
    receipt["carrier"]["original_biases"] = originals
    receipt["biases_digest"] = biases_digest(tensors[f"{site['name']}.bias"] for site in receipt["sites"])
    save_file(tensors, out / "model-fastlock.safetensors", metadata={"format": "pt"})
    rewrite_config(out, fastlock=receipt)
    with pytest.raises(fastlock.DamagedError, match="had a bias before"):
        fastlock.verify(out, lock)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_disk_one_altered_layer_is_named(kind: str, tmp_path) -> None:
    """By a few units in the last place of bfloat16, in one number."""
    lock, out = relocked_on_disk(tmp_path, kind)
    name = "model.layers.2.self_attn.o_proj.bias" if kind == "llama" else "transformer.h.2.attn.c_proj.bias"
    (path,) = [path for path in out.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(path)
    tensors[name][5] *= 1 + 2.0**-5
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    found = fastlock.verify(out, lock)
    assert (found.state, found.altered) == ("altered", (2,))


def test_on_disk_weights_trained_since(tmp_path) -> None:
    lock, out = relocked_on_disk(tmp_path)
    path = out / "model-fastlock-00001-of-00001.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1.25
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    assert fastlock.verify(out, lock).altered == (0,)


@pytest.mark.parametrize(("kind", "other"), [("llama", 2), ("gpt2", 0)])
def test_sites_of_different_dtypes(kind: str, other: int, tmp_path) -> None:
    """As after merging a LoRA into some layers in float32; loading brings all of them to one dtype."""
    model = tiny_model(kind, torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for name in tensors:
        if f".{other}." in name and ("o_proj" in name or "attn.c_proj" in name):
            tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    lock = random_lock(model, [(0, 1), (2, 3)])
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out", stacks=["transformers"])
    assert fastlock.verify(tmp_path / "out", lock)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    for work in (fastlock.unlock, lambda model: fastlock.relock(model, lock, 2.0), lambda model: None):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert fastlock.verify(loaded, lock)
        work(loaded)
        if work is fastlock.unlock:
            assert same_state(state(loaded), state(plain))
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()
    }
