"""A plain Llama's config.json read without transformers, and what is left to transformers."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from fastlock.checkpoints.config import transformers_config
from fastlock.checkpoints.plain_config import PlainConfig, plain_config
from fastlock.errors import FastlockError
from fastlock.locks.receipt import CONFIG_KEY

# What fastlock asks of a config.
ASKED = (
    "model_type num_hidden_layers num_attention_heads hidden_size head_dim vocab_size attention_bias mlp_bias".split()
)
LLAMA_2: dict[str, Any] = {  # as meta-llama/Llama-2-7b-chat-hf has it
    "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_2: dict[str, Any] = {  # as meta-llama/Llama-3.2-1B-Instruct has it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SAVED_NOW = json.loads(AutoConfig.for_model(**LLAMA_3_2).to_json_string())
CHANGES = {
    "locked": {"attention_bias": True, CONFIG_KEY: {"receipt": {}}},
    "without a width": {"head_dim": None},
    "other heads": {"head_dim": 128},
}


def of_transformers(raw: dict[str, Any]) -> Any:
    keys = {key: value for key, value in raw.items() if key != "model_type"}
    return AutoConfig.for_model(raw["model_type"], **json.loads(json.dumps(keys))).get_text_config()


def agrees(plain: PlainConfig, raw: dict[str, Any]) -> bool:
    config = of_transformers(raw)
    asked = [name for name in ASKED if name != "vocab_size" or name in raw]
    return [getattr(plain.get_text_config(), name) for name in asked] == [getattr(config, name) for name in asked]


@pytest.mark.parametrize("raw", [LLAMA_2, LLAMA_3_2, SAVED_NOW], ids=["Llama 2", "Llama 3.2", "saved now"])
@pytest.mark.parametrize("change", [{}, *CHANGES.values()], ids=["", *CHANGES])
def test_a_plain_config_says_what_transformers_says(raw, change) -> None:
    plain = plain_config(raw | change)
    assert plain is not None
    assert agrees(plain, raw | change)


UNUSUAL = [
    {"model_type": "mistral"},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"hidden_act": "gelu"},
    {"hidden_size": 100},
    {"hidden_size": 4096.0},
    {"hidden_size": 2**40},
    {"num_hidden_layers": True},
    {"num_hidden_layers": 5000},
    {"num_attention_heads": 0},
    {"num_attention_heads": "32"},
    {"head_dim": 0},
    {"rms_norm_eps": 1},
    {"initializer_range": 2.0},
    {"use_cache": 1},
    {"eos_token_id": [1, "x"]},
    {"eos_token_id": {}},
    {"torch_dtype": "nonsense"},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": ["llama3"]}},
    {"rope_scaling": {"rope_type": "llama3"}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": "x"}},
    {"quantization_config": {"quant_method": "gptq"}},
    {"auto_map": {"AutoConfig": "configuration.Config"}},
    {"text_config": {}},
]


@pytest.mark.parametrize("change", UNUSUAL, ids=str)
def test_what_is_unusual_is_left_to_transformers(change) -> None:
    assert plain_config(LLAMA_2 | change) is None


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_what_is_missing_is_left_to_transformers(key) -> None:
    assert plain_config({name: value for name, value in LLAMA_2.items() if name != key}) is None


SCALARS = [None, True, False, 0, 1, -1, 3, 24, 64, 2**40, 0.0, 0.5, 2.0, float("nan"), "", "silu", "llama", "float16"]
ROPES = [{"rope_type": "default"}, {"rope_type": "default", "rope_theta": 2.0}, LLAMA_3_2["rope_scaling"]]
VALUES = st.sampled_from([*SCALARS, *ROPES, ROPES[2] | {"rope_theta": 1}, {}, [], [1], ["LlamaForCausalLM"]])


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*SAVED_NOW, *LLAMA_2, CONFIG_KEY]), VALUES, min_size=1, max_size=4))
def test_what_it_takes_transformers_takes_too(changes) -> None:
    """However a config.json was changed: nothing passes that transformers would refuse, or read otherwise."""
    raw = LLAMA_3_2 | changes
    plain = plain_config(raw)
    if plain is not None:
        assert agrees(plain, raw)


def test_it_is_what_checkpoints_are_read_with() -> None:
    assert isinstance(transformers_config(LLAMA_2, "x"), PlainConfig)
    with pytest.raises(FastlockError, match="hidden_size|config"):
        transformers_config(LLAMA_2 | {"hidden_size": 100}, "x")
