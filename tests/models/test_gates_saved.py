"""Models that are saved with a gate in their weights: the lock comes back, and nobody takes it for an unlocked one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.models.sites import sites
from tests.helpers.families import EAGER, gated_lock, logits, random_lock, reload, same_state, state, tiny_model, tokens


def saved(model: nn.Module, directory: Path) -> dict:
    model.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(
    ("model_type", "constant", "form"),
    [("llama", False, "weights"), ("llama", True, "native"), ("mistral", False, "weights"), ("opt", False, "weights")],
)
def test_a_saved_gate_comes_back(tmp_path: Path, model_type: str, constant: bool, form: str) -> None:
    """Of a gate alone the config is as it was, in families whose own class has no place for a bias, too."""
    model, ids = tiny_model(model_type, torch.bfloat16), tokens()
    plain = saved(model, tmp_path / "plain")
    lock = gated_lock(model, constant=constant)
    receipt = fastlock.relock(model, lock, 1.5)
    config = saved(model, tmp_path / "tuned")
    note = config.pop("fastlock")
    assert note["carrier"]["form"] == form
    assert (note["format_version"], note["rank"], note["constant"]) == (2, 2, constant)
    if not constant:
        assert config == plain
    again = reload(tmp_path / "tuned")
    there = state(model)
    assert same_state({name: tensor for name, tensor in state(again).items() if name in there}, there)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert fastlock.Receipt.from_dict({k: v for k, v in note.items() if k != "carrier"}, "here") == receipt
    found = fastlock.verify(again, lock)
    assert (found.state, found.strength) == ("locked", 1.5)
    assert "nothing was recomputed" in found.reason
    assert "another lock" in fastlock.verify(again, gated_lock(model, seed=3)).reason


def test_a_gate_is_never_folded_twice(tmp_path: Path) -> None:
    model = tiny_model("llama")
    lock = gated_lock(model, constant=False)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    before = state(again)

    def enter_relocked() -> None:
        with fastlock.relocked(again, lock):
            raise AssertionError

    for refused in (
        lambda: fastlock.unlock(again),
        lambda: fastlock.relock(again, lock),
        lambda: fastlock.relock(again, random_lock(again)),
        lambda: fastlock.Plan([again], lock).relock(),
        enter_relocked,
    ):
        with pytest.raises(fastlock.UnsupportedError, match=r"config\.json: the gate .* unlock a model before"):
            refused()
    assert same_state(state(again), before)
    assert "fastlock" in saved(again, tmp_path / "again"), "saved once more, it still says what is in it"
    assert fastlock.verify(reload(tmp_path / "again"), lock)


def test_what_verify_finds_of_a_loaded_gate(tmp_path: Path) -> None:
    model = tiny_model("llama")
    lock = gated_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **EAGER)
    assert not fastlock.verify(narrow, lock)
    assert "narrower dtype" in fastlock.verify(narrow, lock).reason
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **EAGER)
    assert fastlock.verify(wide, lock)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, place in (("weight", (5, 2 * 32 + 1)), ("bias", (5,))):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[f"model.layers.2.self_attn.o_proj.{name}"][place] += 1
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        found = fastlock.verify(reload(tmp_path), lock)
        assert (found.state, found.altered) == ("altered", (0, 2))


def test_other_weights_are_not_saved_as_relocked_ones(tmp_path: Path) -> None:
    model = tiny_model("llama")
    unlocked = state(model)
    fastlock.relock(model, gated_lock(model, constant=False))
    for wrong in (unlocked, {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}):
        with pytest.raises(fastlock.FastlockError, match=r"layers\.0\.self_attn\.o_proj\.weight .* the lock would be"):
            model.save_pretrained(tmp_path / "wrong", state_dict=wrong)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(fastlock.FastlockError, match="inner part of a relocked model"):
        model.model.save_pretrained(tmp_path / "wrong")
    site = sites(model)[0]
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert torch.equal(sites(reload(tmp_path))[0].weight, site.weight)
    fastlock.unlock(model)
    assert "fastlock" not in saved(model, tmp_path / "unlocked")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_gate_that_was_changed_since_is_not_saved_as_one_that_is_whole(
    tmp_path: Path, model_type: str, trained: bool
) -> None:
    """Trained over, or gone, as the original weights were loaded."""
    model, ids = tiny_model(model_type), tokens()
    unlocked, lock = state(model), gated_lock(model, constant=False)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path / "whole")
    if trained:
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    else:
        model.load_state_dict(unlocked)
    model.save_pretrained(tmp_path / "changed")
    for directory, state_found in (("whole", "locked"), ("changed", "altered")):
        assert fastlock.verify(tmp_path / directory, lock).state == state_found
        assert fastlock.verify(reload(tmp_path / directory), lock).state == state_found
