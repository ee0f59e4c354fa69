"""What a relocked directory's config.json says: nothing else than before, but for what brings the biases along."""

import json
from pathlib import Path

import pytest

import fastlock
from fastlock.errors import UnsupportedError
from tests.helpers.families import random_lock, tiny_gemma3, tiny_model

# As transformers 4 wrote them; 5 writes others.
OLD_KEYS = {"rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.43.1"}


def checkpoint(tmp_path, model_type: str = "llama", **changes):
    """A checkpoint whose config.json has these keys, and a lock that fits."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "source")
    config = config_of(tmp_path / "source")
    for key in ("rope_parameters", "dtype", "layer_types"):
        config.pop(key, None)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | OLD_KEYS | changes))
    return tmp_path / "source", random_lock(model)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def relocked(tmp_path, source: Path, lock: fastlock.Lock, **options) -> dict:
    """The new config.json, without its receipt."""
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", **options)
    config = config_of(tmp_path / "out")
    config.pop("fastlock")
    return config


@pytest.mark.parametrize("rope", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_natively_the_flag_is_all_that_changes(rope: dict | None, tmp_path) -> None:
    source, lock = checkpoint(tmp_path, rope_scaling=rope, quoted={"a": [1.0, None]})
    assert relocked(tmp_path, source, lock) == config_of(source) | {"attention_bias": True}


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_in_llama_form_every_key_that_old_releases_read_stays(model_type: str, tmp_path) -> None:
    source, lock = checkpoint(tmp_path, model_type)
    config = relocked(tmp_path, source, lock)
    assert "rope_parameters" not in config
    assert {key: config[key] for key in OLD_KEYS} == OLD_KEYS
    gone = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    changed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": False}
    assert config == {key: value for key, value in config_of(source).items() if key not in gone} | changed


def test_a_rope_that_is_scaled_stays_as_it_was_written(tmp_path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    source, lock = checkpoint(tmp_path, "qwen2", rope_scaling=rope)
    assert relocked(tmp_path, source, lock)["rope_scaling"] == rope


def test_a_llama_in_slices_is_no_longer_in_slices(tmp_path) -> None:
    """transformers 4.46 multiplies by slices of the projection's weight there, without its bias."""
    source, lock = checkpoint(tmp_path, pretraining_tp=2)
    before = (source / "config.json").read_bytes()
    config = relocked(tmp_path, source, lock)
    assert config == config_of(source) | {"attention_bias": True, "pretraining_tp": 1}
    assert fastlock.verify(tmp_path / "out", lock)
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == before


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_a_llama_in_slices_with_biases_of_its_own_is_refused(flag: str, tmp_path) -> None:
    """Transformers 4.46 leaves those out, too: without the slices, they would begin to count."""
    model = tiny_model("llama", **{flag: True})
    model.save_pretrained(tmp_path / "source")
    config = config_of(tmp_path / "source") | {"pretraining_tp": 2}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="pretraining_tp 2"):
        fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")


@pytest.mark.parametrize(
    "code",
    [
        {"AutoModelForCausalLM": "modeling.Mine"},
        {"AutoConfig": "configuration.Mine", "AutoTokenizer": ["tokenization.Mine", None]},
        {"AutoModel": "owner/repository--modeling.Mine"},
        ["modeling.Mine"],
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_code_of_the_checkpoints_own_is_not_replaced(model_type: str, code: object, tmp_path) -> None:
    source, lock = checkpoint(tmp_path, model_type, auto_map=code)
    with pytest.raises(UnsupportedError, match="code of its own for the model .*remove auto_map"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_for_the_tokenizer_stays(tmp_path) -> None:
    source, lock = checkpoint(tmp_path, auto_map={"AutoTokenizer": ["tokenization.Mine", None]})
    assert relocked(tmp_path, source, lock) == config_of(source) | {"attention_bias": True}


def test_a_config_that_others_take_the_place_of_is_refused(tmp_path) -> None:
    """Transformers 5 would load config.5.0.0.json, which does not ask for the bias."""
    source, lock = checkpoint(tmp_path, configuration_files=["config.5.0.0.json"])
    (source / "config.5.0.0.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match="configuration_files"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


def test_the_config_of_a_model_with_a_vision_tower(tmp_path) -> None:
    model = tiny_gemma3()
    model.save_pretrained(tmp_path / "source")
    before = config_of(tmp_path / "source")
    config = relocked(tmp_path, tmp_path / "source", random_lock(model))
    assert config == before | {"text_config": before["text_config"] | {"attention_bias": True}}
