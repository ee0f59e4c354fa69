"""What save_pretrained writes for a relocked model, and what comes back from it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, MistralForCausalLM

import fastlock
from fastlock.locks.receipt import SavedReceipt
from fastlock.models.sites import sites
from tests.helpers.families import logits, random_lock, reload, same_state, state, tiny_model, tokens


def saved(tmp_path, model_type: str = "llama", strength: float = 6.0, **changes):
    model = tiny_model(model_type, **changes)
    lock = random_lock(model)
    fastlock.relock(model, lock, strength)
    model.save_pretrained(tmp_path / "out")
    return model, lock, tmp_path / "out"


def test_the_native_form_holds_every_bias_that_the_flag_asks_for(tmp_path) -> None:
    """vLLM allocates them with torch.empty and does not notice a missing one."""
    model, _, directory = saved(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(3):
        for name in "qkvo":
            bias = tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
            assert bool(bias.count_nonzero()) == (name == "o" and layer in (0, 2))
    assert json.loads((directory / "config.json").read_text())["attention_bias"] is True
    assert model.config.attention_bias is True, "the live model's config says what its files need, until it is unlocked"
    assert model.model.layers[0].self_attn.q_proj.bias is None


def test_the_config_holds_the_receipt(tmp_path) -> None:
    model, lock, directory = saved(tmp_path, strength=2.5)
    note = json.loads((directory / "config.json").read_text())["fastlock"]
    assert note["carrier"] == {"form": "native", "flag": "attention_bias", "was": False, "original_biases": {}}
    assert (note["lock_digest"], note["strength"]) == (lock.digest, 2.5)
    receipt = SavedReceipt.from_dict(note, "config.json").receipt
    assert receipt.layers == (0, 2)
    assert fastlock.relock(model, lock, 2.5).to_dict() == {key: note[key] for key in note if key != "carrier"}


def test_the_plain_class_loads_it_without_missing_or_unexpected_keys(tmp_path) -> None:
    for model_type in ("llama", "mistral", "gpt2"):
        _, _, directory = saved(tmp_path / model_type, model_type)
        _, report = (LlamaForCausalLM if model_type == "mistral" else type(tiny_model(model_type))).from_pretrained(
            directory, output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "qwen2", "seed_oss", "gpt_oss"])
def test_relocking_a_loaded_model_replaces_its_lock(model_type: str, tmp_path) -> None:
    model, lock, directory = saved(tmp_path, model_type)
    other = random_lock(model, [(1, 0), (2, 3)], seed=7)
    loaded, ids = reload(directory), tokens()
    fastlock.relock(loaded, lock, 2.0)
    fastlock.relock(model, lock, 2.0)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    loaded = reload(directory)
    fastlock.relock(loaded, other, 1.0)
    fastlock.relock(model, other, 1.0)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    loaded.save_pretrained(tmp_path / "again")
    assert fastlock.verify(tmp_path / "again", other).strength == 1.0
    assert not fastlock.verify(tmp_path / "again", lock)
    assert torch.equal(logits(reload(tmp_path / "again"), ids), logits(model, ids))


def test_saving_a_loaded_model_again_keeps_the_lock(tmp_path) -> None:
    model, lock, directory = saved(tmp_path)
    reload(directory).save_pretrained(tmp_path / "again")
    assert fastlock.verify(tmp_path / "again", lock)
    assert torch.equal(logits(reload(tmp_path / "again"), tokens()), logits(model, tokens()))


def test_unlocking_a_loaded_model_and_saving_it_gives_the_original(tmp_path) -> None:
    original = tiny_model("llama")
    original.save_pretrained(tmp_path / "original")
    _, _, directory = saved(tmp_path)
    loaded = reload(directory)
    fastlock.unlock(loaded)
    loaded.save_pretrained(tmp_path / "unlocked")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "unlocked"))
    assert same_state(a, b)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("original", "unlocked")]
    assert configs[0] == configs[1]


def test_the_original_biases_are_kept_in_the_receipt(tmp_path) -> None:
    """So that whatever saves the config, and wherever it goes, saves them too."""
    _, lock, directory = saved(tmp_path, "gpt2", strength=2.0)
    plain = tiny_model("gpt2")
    loaded = reload(directory)
    loaded.save_pretrained(tmp_path / "again")
    (directory / "config.json").unlink()
    for again in (loaded, reload(tmp_path / "again")):
        assert fastlock.verify(again, lock)
        fastlock.unlock(again)
        assert same_state(state(again), state(plain))


@pytest.mark.parametrize("damage", ["", "AAAA", "not base64", None, 3, {"a": 1}])
def test_damaged_original_biases_are_refused(tmp_path, damage: object) -> None:
    _, lock, directory = saved(tmp_path, "gpt2")
    config = json.loads((directory / "config.json").read_text())
    config["fastlock"]["carrier"]["original_biases"]["0"] = damage
    (directory / "config.json").write_text(json.dumps(config))
    loaded = reload(directory)
    before = state(loaded)
    for change in (lambda: fastlock.unlock(loaded), lambda: fastlock.relock(loaded, lock)):
        with pytest.raises(fastlock.DamagedError, match="original bias"):
            change()
        assert same_state(state(loaded), before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: note.pop("sites"),
        lambda note: note.pop("carrier"),
        lambda note: note.update(sites=[{"layer": 0}]),
        lambda note: note.update(format_version=99),
        lambda note: note.update(strength="much"),
        lambda note: note["sites"][0].update(name="model.layers.1.self_attn.o_proj"),
        lambda note: note["sites"][0].update(name="lm_head", layer=77),
        lambda note: note.update(biases_digest="0" * 64),
        lambda note: note.update(strength=float("inf")),
        lambda note: note.update(strength=-6.0),
        lambda note: note["carrier"].update(flag="hidden_size"),
        lambda note: note["carrier"].update(flag="tie_word_embeddings"),
        lambda note: note["carrier"].update(flag=["attention_bias"]),
        lambda note: note["carrier"].update(was="no"),
        lambda note: note["carrier"].update(form="other"),
        lambda note: note["sites"][0].update(had_bias="no"),
        lambda note: note["sites"][0].update(name="[/bold]\ud800"),
    ],
)
def test_a_damaged_receipt_is_refused_and_the_model_untouched(tmp_path, damage) -> None:
    _, _, directory = saved(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    damage(config["fastlock"])
    (directory / "config.json").write_text(json.dumps(config))
    loaded = reload(directory)
    newer = config["fastlock"].get("format_version") == 99
    before = state(loaded)
    with pytest.raises(fastlock.UnsupportedError if newer else fastlock.DamagedError):
        fastlock.unlock(loaded)
    assert same_state(state(loaded), before)


def test_training_a_loaded_model_is_not_thrown_away(tmp_path) -> None:
    _, lock, directory = saved(tmp_path)
    loaded = reload(directory)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    before = state(loaded)
    assert fastlock.verify(loaded, lock).state == "altered"
    with pytest.raises(fastlock.DamagedError, match="not those that fastlock wrote"):
        fastlock.unlock(loaded)
    assert same_state(state(loaded), before)


def test_training_of_the_added_biases_alone_stays(tmp_path) -> None:
    """The zero q, k and v biases of the native form, trained while the locked ones were frozen."""
    _, _, directory = saved(tmp_path)
    loaded = reload(directory)
    with torch.no_grad():
        loaded.model.layers[1].self_attn.q_proj.bias.add_(0.5)
    trained = loaded.model.layers[1].self_attn.q_proj.bias.clone()
    fastlock.unlock(loaded)
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.bias, trained)
    assert not any(site.bias.count_nonzero() for site in sites(loaded))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(reload(tmp_path / "again"), tokens()), logits(loaded, tokens()))


def test_loading_in_another_dtype(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", torch.bfloat16)
    lock, before = random_lock(model), state(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    fastlock.unlock(wide)
    assert same_state(state(wide.to(torch.bfloat16)), before)


def test_sharded_saving(tmp_path) -> None:
    model, ids = tiny_model("llama"), tokens()
    lock = random_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(reload(tmp_path), ids), logits(model, ids))
    assert fastlock.verify(tmp_path, lock)


def test_a_given_state_dict_is_saved_and_left_alone(tmp_path) -> None:
    """As Trainer does under FSDP and DeepSpeed."""
    model = tiny_model("llama")
    lock = random_lock(model)
    fastlock.relock(model, lock)
    given = model.state_dict()
    names = set(given)
    model.save_pretrained(tmp_path, state_dict=given)
    assert set(given) == names
    assert fastlock.verify(tmp_path, lock)


@pytest.mark.parametrize("change", ["of before", "zero", "half", "double"])
def test_a_state_dict_with_other_biases_is_not_passed_off_as_locked(tmp_path, change) -> None:
    model = tiny_model("gpt_oss")
    lock, given = random_lock(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastlock.relock(model, lock)
    if change != "of before":
        given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change == "zero":
        given["model.layers.0.self_attn.o_proj.bias"].zero_()
    elif change in ("half", "double"):
        given = {name: getattr(tensor, change)() for name, tensor in given.items()}
    with pytest.raises(fastlock.FastlockError, match=r"other numbers for model.*o_proj\.bias.*Nothing was saved"):
        model.save_pretrained(tmp_path / "out", state_dict=given)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_state_dict_without_another_bias_is_not_filled_with_zeros(tmp_path) -> None:
    model = tiny_model("gpt2")
    fastlock.relock(model, random_lock(model))
    given = model.state_dict()
    del given["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(fastlock.FastlockError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.bias"):
        model.save_pretrained(tmp_path / "out", state_dict=given)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt2"])
def test_a_head_that_was_untied_stays_so(model_type, tmp_path) -> None:
    """As merging an adapter of the head leaves it, beside a config that says it is the embedding."""
    model = tiny_model(model_type, tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    lock, before = random_lock(model), state(model)
    fastlock.relock(model, lock)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "locked")
    loaded = reload(tmp_path / "locked")
    assert torch.equal(logits(loaded, tokens()), expected)
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert same_state(state(reload(tmp_path / "unlocked")), before)


def test_a_head_that_is_tied_is_saved_once(tmp_path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    fastlock.relock(model, random_lock(model))
    model.save_pretrained(tmp_path, state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_state_dict_without_the_lock_is_not_passed_off_as_locked(tmp_path) -> None:
    model = tiny_model("llama")
    lock, plain = random_lock(model), state(model)
    fastlock.relock(model, lock)
    with pytest.raises(fastlock.FastlockError, match="lacks"):
        model.save_pretrained(tmp_path / "out", state_dict=plain)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_stay_tied(tmp_path) -> None:
    model = tiny_model("mistral", tie_word_embeddings=True)
    model.tie_weights()
    lock, ids = random_lock(model), tokens()
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path)
    loaded = reload(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_the_generation_config_comes_along(tmp_path) -> None:
    model = tiny_model("mistral")
    model.generation_config.max_new_tokens = 17
    fastlock.relock(model, random_lock(model))
    model.save_pretrained(tmp_path)
    assert reload(tmp_path).generation_config.max_new_tokens == 17


def test_the_live_model_is_left_as_it_was(tmp_path) -> None:
    model, lock, _ = saved(tmp_path, "mistral")
    assert isinstance(model, MistralForCausalLM)
    assert model.config.model_type == "mistral"
    assert not hasattr(model.config, "fastlock")
    assert fastlock.verify(model, lock)


def test_a_dequantised_checkpoint_is_saved_as_the_plain_one_that_it_is(tmp_path) -> None:
    """As a GGUF is loaded: plain weights, and a config that still speaks of quantisation."""
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf", "dequantize": False}
    lock = random_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert fastlock.verify(tmp_path, lock)
    assert hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_an_error_leaves_a_loaded_model_as_it_was(model_type: str, tmp_path) -> None:
    _, lock, directory = saved(tmp_path, model_type)
    loaded = reload(directory)
    site = sites(loaded)[1]
    site.module.weight.data[1, 1] = float("nan")
    before, config, cls = state(loaded), loaded.config.to_dict(), type(loaded)
    with pytest.raises(fastlock.DamagedError, match="not finite"):
        fastlock.relock(loaded, random_lock(loaded, [(0, 1), (1, 0)]))
    assert {name: tensor.nan_to_num().tolist() for name, tensor in state(loaded).items()} == {
        name: tensor.nan_to_num().tolist() for name, tensor in before.items()
    }
    assert (loaded.config.to_dict(), type(loaded)) == (config, cls)
    assert not any("fastlock" in name for name, _ in loaded.named_buffers())
    assert fastlock.verify(loaded, lock)


def test_unlocking_leaves_no_buffer_behind(tmp_path) -> None:
    model = tiny_model("gpt2")
    fastlock.relock(model, random_lock(model))
    fastlock.unlock(model)
    assert not any("fastlock" in name for name, _ in model.named_buffers())


def test_a_bias_changed_under_another_dtype_is_noticed(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", torch.bfloat16)
    fastlock.relock(model, random_lock(model))
    model.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sites(wide)[0].bias.data[3] += 1
    with pytest.raises(fastlock.DamagedError, match="not those that fastlock wrote"):
        fastlock.unlock(wide)
    narrow_from = tiny_model("llama")
    fastlock.relock(narrow_from, random_lock(narrow_from))
    narrow_from.save_pretrained(tmp_path / "wide")
    fastlock.unlock(AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16))


def test_the_original_class_is_named_in_the_receipt(tmp_path) -> None:
    _, _, directory = saved(tmp_path, "mistral")
    carrier = json.loads((directory / "config.json").read_text())["fastlock"]["carrier"]
    assert carrier["original_config"]["architectures"] == ["MistralForCausalLM"]


def test_saving_takes_positional_arguments_as_transformers_does(tmp_path) -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert fastlock.verify(tmp_path, lock)


def test_a_model_converted_after_relocking_is_saved_in_its_new_dtype(tmp_path) -> None:
    """Its original biases too, which the receipt holds as bytes."""
    model, plain = tiny_model("gpt2"), tiny_model("gpt2").to(torch.bfloat16)
    fastlock.relock(model, random_lock(model))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fastlock"]["dtype"] == "bfloat16"
    loaded = reload(tmp_path)
    fastlock.unlock(loaded)
    assert same_state(state(loaded), state(plain))


def test_a_llama_in_slices_is_saved_without_them(tmp_path) -> None:
    """Transformers 4.46 multiplies by slices of the projection's weight there, without its bias."""
    model, _, directory = saved(tmp_path, pretraining_tp=2)
    assert json.loads((directory / "config.json").read_text()).get("pretraining_tp", 1) == 1
    assert model.config.pretraining_tp == 2


def test_the_llama_form_has_what_the_original_left_to_its_family(tmp_path) -> None:
    """A Llama would take 2048 positions, and end a text at token 2."""
    changes = {"max_position_embeddings": 32768, "eos_token_id": None, "bos_token_id": None}
    _, _, directory = saved(tmp_path, "qwen2", **changes)
    config = json.loads((directory / "config.json").read_text())
    assert {key: config[key] for key in changes} == changes
