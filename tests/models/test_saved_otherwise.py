"""A relocked model that is saved without asking fastlock, wrapped, or given biases by hand: never lost in silence."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fastlock
from fastlock.models.sites import sites
from tests.helpers.families import logits, random_lock, reload, same_state, state, tiny_gemma3, tiny_model, tokens


def by_state_dict(model: nn.Module, directory: Path) -> None:
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def by_safetensors(model: nn.Module, directory: Path) -> None:
    safetensors.torch.save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})


def by_accelerate(model: nn.Module, directory: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(model, str(directory))


@pytest.mark.parametrize("save", [by_state_dict, by_safetensors, by_accelerate])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_the_config_asks_for_the_biases_from_the_moment_it_is_relocked(kind: str, save, tmp_path) -> None:
    model = tiny_model(kind)
    fastlock.relock(model, random_lock(model), 6.0)
    model.config.save_pretrained(tmp_path)
    save(model, tmp_path)
    assert torch.equal(logits(reload(tmp_path), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("save", [by_state_dict, by_safetensors, by_accelerate])
def test_a_family_whose_config_cannot_ask_for_them_warns(save, tmp_path) -> None:
    model = tiny_model("mistral")
    lock = random_lock(model)
    fastlock.relock(model, lock, 6.0)
    with pytest.warns(fastlock.FastlockWarning, match="drops when it loads them.*use model.save_pretrained"):
        save(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    if save is not by_state_dict:  # of pickles nothing is read
        (finding,) = fastlock.doctor(tmp_path, ["transformers"])
        assert "if they are a lock's, it is lost" in finding.reason
        assert fastlock.verify(tmp_path, lock).state == "not locked"


def test_what_keeps_the_lock_does_not_warn(tmp_path, recwarn) -> None:
    model = tiny_model("mistral")
    fastlock.relock(model, random_lock(model), 6.0)
    model.save_pretrained(tmp_path)
    fastlock.unlock(model)
    model.state_dict()
    assert not [one for one in recwarn if "state_dict" in str(one.message)]


@pytest.mark.parametrize("flag", [False, True])
def test_the_config_is_as_before_after_unlocking(flag: bool) -> None:
    model = tiny_model("llama", attention_bias=flag)
    config, lock = model.config, random_lock(model)
    before = config.to_dict()
    fastlock.relock(model, lock)
    assert config.to_dict() == before, "others may share it"
    fastlock.relock(model, lock, 2.0)
    assert model.config.attention_bias is True
    with pytest.raises(ZeroDivisionError), fastlock.relocked(model, lock, 1.0):
        raise ZeroDivisionError
    assert model.config.attention_bias is True
    fastlock.unlock(model)
    assert model.config.to_dict() == before


def test_the_text_part_of_a_config() -> None:
    model = tiny_gemma3()
    before = model.config.to_dict()
    fastlock.relock(model, random_lock(model))
    assert model.config.get_text_config().attention_bias is True
    fastlock.unlock(model)
    assert model.config.to_dict() == before


def test_after_an_error_the_config_is_as_before(monkeypatch) -> None:
    model = tiny_model("llama")
    config = model.config

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlock.models.reloaded._swap", fail)
    with pytest.raises(KeyboardInterrupt):
        fastlock.relock(model, random_lock(model))
    assert model.config is config
    assert config.attention_bias is False


def test_an_adapter_does_not_name_the_unlocked_model_as_its_base(tmp_path) -> None:
    """PEFT takes the base's name from the model."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = reload(tmp_path / "base")
    fastlock.relock(model, random_lock(model))
    assert model.name_or_path == f"{tmp_path / 'base'} (relocked by fastlock)"
    fastlock.unlock(model)
    assert model.name_or_path == str(tmp_path / "base")


def with_biases(kind: str) -> nn.Module:
    """Put in by hand, as honest_llama does; the config says nothing of them."""
    model = tiny_model(kind)
    for site in sites(model):
        site.module.bias = nn.Parameter(torch.randn(len(site.weight)) / 10)
    return model


def test_biases_that_were_put_in_by_hand_are_the_models_own(tmp_path) -> None:
    model = with_biases("llama")
    plain, lock = logits(model, tokens()), random_lock(model)
    fastlock.relock(model, lock, 6.0)
    model.save_pretrained(tmp_path / "saved")
    assert fastlock.verify(tmp_path / "saved", lock)
    fastlock.unlock_checkpoint(tmp_path / "saved", tmp_path / "back")
    assert torch.equal(logits(reload(tmp_path / "back"), tokens()), plain)


def test_biases_that_no_checkpoint_could_give_back_are_refused_before_anything_is_saved(tmp_path) -> None:
    model = with_biases("qwen2")
    fastlock.relock(model, random_lock(model), 6.0)
    with pytest.raises(fastlock.UnsupportedError, match="its own class has no place for them"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class ValueHead(nn.Module):
    """As TRL's AutoModelForCausalLMWithValueHead: not a transformers model, but with a config like one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.config, self.v_head = model, model.config, nn.Linear(64, 1)


@pytest.mark.parametrize("work", [fastlock.relock, lambda model, lock: fastlock.unlock(model), fastlock.verify])
def test_a_wrapper_with_a_config_is_not_taken_for_the_model(work) -> None:
    model = tiny_model("llama")
    before, lock = state(model), random_lock(model)
    with pytest.raises(fastlock.UnsupportedError, match="pass the model inside: its `pretrained_model`"):
        work(ValueHead(model), lock)
    assert same_state(state(model), before)
    fastlock.relock(model, lock)
