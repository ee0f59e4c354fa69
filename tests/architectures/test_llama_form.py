"""A Mistral's or Qwen2's config as a Llama's: key by key, for every release of transformers."""

import copy
import re

import pytest
from transformers import AutoConfig, LlamaConfig

from fastlock.architectures.llama_form import LLAMA_FORM, llama_config
from fastlock.errors import UnsupportedError

# As their makers released them.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SMALLEST = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}


def as_llama(keys: dict) -> dict:
    before = copy.deepcopy(keys)
    config = AutoConfig.for_model(**copy.deepcopy(keys))
    new = llama_config(config, keys, LLAMA_FORM[keys["model_type"]], "What works: W.")
    assert keys == before
    return new


def test_a_released_mistral() -> None:
    assert as_llama(MISTRAL) == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": 32000,
    }


def test_a_released_qwen2_that_is_stretched() -> None:
    assert as_llama(QWEN2) == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "vocab_size": 152064,
    }


def test_what_is_left_to_the_family_is_written_where_a_llama_takes_another_value() -> None:
    common = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": False, "model_type": "llama"}
    assert as_llama(SMALLEST | {"model_type": "mistral", "sliding_window": None}) == SMALLEST | common | {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    }
    few = SMALLEST | {"num_attention_heads": 32}
    assert as_llama(few | {"model_type": "qwen2"}) == few | common | {
        "bos_token_id": None,
        "eos_token_id": None,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
    }


@pytest.mark.parametrize("model_type", LLAMA_FORM)
def test_the_installed_transformers_reads_the_same_from_both(model_type: str) -> None:
    """Every key that both classes have, with nothing given that could be left out."""
    keys = {"model_type": model_type, "sliding_window": None}
    ours, theirs = (config.to_dict() for config in (AutoConfig.for_model(**keys), LlamaConfig(**as_llama(keys))))
    differing = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    assert differing == {"model_type", "architectures"}


def test_keys_of_a_llama_that_the_family_does_not_read_do_not_start_to_count() -> None:
    strange = {"pretraining_tp": 2, "qkv_bias": False, "mlp_bias": True, "attention_bias": False}
    assert as_llama(MISTRAL | strange) == as_llama(MISTRAL)


def test_a_key_that_nobody_knows_stays() -> None:
    assert as_llama(MISTRAL | {"quoted": [1]})["quoted"] == [1]


def test_a_head_dim_that_is_null_stays_so() -> None:
    assert as_llama(MISTRAL | {"head_dim": None})["head_dim"] is None


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (MISTRAL | {"sliding_window": 4096}, "sliding window of 4096 tokens"),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, "sliding window of 4096 tokens"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 20}, "sliding window of 131072 tokens"),
        (QWEN2 | {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual chunk attention"),
        (MISTRAL | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "transformers before 4.48"),
        (MISTRAL | {"hidden_size": 4100, "head_dim": 128}, "cannot have this config"),
    ],
)
def test_what_a_llama_would_compute_otherwise_is_refused(keys: dict, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s){re.escape(why)}.*What works: W"):
        as_llama(keys)


def test_another_class_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="MistralForSequenceClassification"):
        llama_config(AutoConfig.for_model(**MISTRAL), MISTRAL, "MistralForSequenceClassification", "")
