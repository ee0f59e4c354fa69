"""The LoRA that leaves a band alone: no parameter of it gets an adapter, whatever PEFT makes of the config."""

import hashlib
import warnings

import peft
import pytest
import torch

import fastlock
from fastlock.errors import FastlockError, MismatchError, UnsupportedError
from fastlock.finetuning.decoder_layers import decoder_layers
from tests.helpers.families import CONFIGS, tiny_gemma3, tiny_model, tokens

BAND = fastlock.Band(1, 1)
# Of these, transformers keeps the experts of a layer in one parameter, and PEFT adapts them unless it is stopped.
EXPERTS = ("dots1", "ernie4_5_moe", "glm4_moe", "mixtral", "olmoe", "qwen3_moe")


def adapted(model, config) -> set[str]:
    """What is trained, by its name in the model without adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about what it did not find
        tuned = peft.get_peft_model(model, config)
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    return {name.removeprefix("base_model.model.") for name in trained}


@pytest.mark.parametrize("given", [False, True], ids=["by name", "with the model"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_family(kind, given) -> None:
    model = tiny_model(kind)
    path = decoder_layers(model).path
    config = fastlock.lora_outside(BAND, r=2, model=model if given else None)
    if kind in EXPERTS and not given:
        with pytest.raises(UnsupportedError, match="experts of every layer.*model="):
            adapted(model, config)
        return
    names = adapted(model, config)
    assert not [name for name in names if name.startswith(f"{path}.1.")]
    for layer in (0, 2):
        assert [name for name in names if name.startswith(f"{path}.{layer}.")], layer
    assert all("lora_" in name for name in names)


def test_as_many_adapters_as_without_a_band_but_for_the_bands() -> None:
    every = adapted(tiny_model("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    outside = adapted(tiny_model("llama"), fastlock.lora_outside(BAND, r=2))
    assert every - outside == {name for name in every if ".layers.1." in f".{name}"}
    assert len(every - outside) == len(every) / 3


def test_layer_1_is_not_layer_11() -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    names = adapted(model, fastlock.lora_outside(BAND, r=2))
    assert {int(name.split(".")[2]) for name in names} == {0, *range(2, 12)}


def test_experts_have_numbers_of_their_own() -> None:
    """The number of an expert is not that of a layer."""
    config = fastlock.lora_outside(BAND, r=2, target=["w1"])
    from peft.tuners.tuners_utils import check_target_module_exists

    assert check_target_module_exists(config, "model.layers.0.mlp.experts.1.w1") is True
    assert not check_target_module_exists(config, "model.layers.1.mlp.experts.0.w1")
    assert not check_target_module_exists(config, "layers.1.w1")


def test_vision_towers_are_adapted_if_the_model_is_given() -> None:
    model = tiny_gemma3()
    names = adapted(model, fastlock.lora_outside(fastlock.Band(0, 1), r=2, model=model))
    assert [name for name in names if "vision" in name and ".layers.0." in name]
    assert not [name for name in names if "language_model.layers.0." in name or "language_model.layers.1." in name]
    assert [name for name in names if "language_model.layers.2." in name]


def test_training_and_merging_leave_the_bands_bytes(tmp_path) -> None:
    def digests(model):
        return {
            name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in model.state_dict().items()
        }

    model = tiny_model("llama")
    before = digests(model)
    tuned = peft.get_peft_model(model, fastlock.lora_outside(BAND, r=2, lora_alpha=8, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    for step in range(4):
        ids = tokens(seed=step)
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = digests(tuned.merge_and_unload())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "_proj" in name and ".layers.1." not in name}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ["q_proj"]}, "`target` here"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"bias": "all"}, "lora_only"),
        ({"modules_to_save": ["norm"]}, "model="),
        ({"modules_to_save": ["input_layernorm"], "model": tiny_model("llama")}, r"layers\.1\.input_layernorm"),
        ({"modules_to_save": ["mlp"], "model": tiny_model("llama")}, r"layers\.1\.mlp"),
    ],
)
def test_options_that_reach_into_the_band_are_refused(options, said) -> None:
    with pytest.raises(UnsupportedError, match=said):
        fastlock.lora_outside(BAND, **options)


def test_modules_outside_may_be_trained_whole() -> None:
    model = tiny_model("llama")
    names = adapted(model, fastlock.lora_outside(BAND, r=2, model=model, modules_to_save=["lm_head"], bias="lora_only"))
    assert [name for name in names if name.startswith("lm_head")]
    assert not [name for name in names if ".layers.1." in name]


@pytest.mark.parametrize("r", [0, -1, 1.5, True])
def test_ranks(r) -> None:
    with pytest.raises(FastlockError, match=f"r is {r!r}"):
        fastlock.lora_outside(BAND, r=r)


def test_bands_of_other_models_and_missing_peft_are_refused(monkeypatch) -> None:
    with pytest.raises(MismatchError, match="lies outside"):
        fastlock.lora_outside(fastlock.Band(2, 3), model=tiny_model("llama"))
    with pytest.raises(FastlockError, match="the band is str"):
        fastlock.lora_outside("band.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install peft"):
        fastlock.lora_outside(BAND)
