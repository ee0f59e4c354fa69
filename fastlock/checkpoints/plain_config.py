"""The config.json of a Llama that says nothing unusual, read without transformers.

For any config class, transformers imports what it compiles and distributes models with: that takes longer than
relocking the checkpoint. What such a config.json says is known without it. A key or a value that is not in the table
leaves the config to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fastlock.locks.receipt import CONFIG_KEY

LARGEST = 2**20  # larger sizes are left to transformers


class PlainConfig(SimpleNamespace):
    """As much of a transformers config as is asked of one."""

    def get_text_config(self) -> PlainConfig:
        """The decoder's part: all of it."""
        return self


def plain_config(raw: dict[str, Any]) -> PlainConfig | None:
    """What transformers would make of a parsed config.json; None where only transformers can tell."""
    if not raw.keys() >= _NEEDED or not all(key in _LLAMA and _LLAMA[key](value) for key, value in raw.items()):
        return None
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    if hidden % heads != 0:
        return None
    head_dim = raw.get("head_dim") or hidden // heads
    return PlainConfig(**{"attention_bias": False, "mlp_bias": False} | raw | {"head_dim": head_dim})


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _is_layer_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1000


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_float(value: Any) -> bool:
    return type(value) is float


def _is_token(value: Any) -> bool:
    return type(value) is int


def _is_rope(value: Any) -> bool:
    """The plain rotary embedding, or that of Llama 3.1."""
    if type(value) is not dict or type(value.get("rope_type")) is not str:
        return False
    numbers = {key: number for key, number in value.items() if key != "rope_type"}
    keys = _ROPE.get(value["rope_type"])
    return all(map(_is_number, numbers.values())) and numbers.keys() - {"rope_theta"} == keys


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in (str, list) and value in values


_ROPE = {
    "default": set[str](),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_DTYPE = _one_of("float32", "float16", "bfloat16")
_NEEDED = {"model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"}
_LLAMA: dict[str, Callable[[Any], bool]] = {
    "model_type": _one_of("llama"),
    "architectures": _one_of(["LlamaForCausalLM"]),
    "vocab_size": _is_size,
    "hidden_size": _is_size,
    "intermediate_size": _is_size,
    "num_hidden_layers": _is_layer_count,
    "num_attention_heads": _is_size,
    "num_key_value_heads": _or_none(_is_size),
    "head_dim": _or_none(_is_size),
    "hidden_act": _one_of("silu"),
    "max_position_embeddings": _is_token,
    "initializer_range": lambda value: _is_float(value) and 0 <= value <= 1,
    "rms_norm_eps": _is_float,
    "use_cache": _is_flag,
    "pad_token_id": _or_none(_is_token),
    "bos_token_id": _or_none(_is_token),
    "eos_token_id": lambda value: (
        value is None or _is_token(value) or (type(value) is list and all(map(_is_token, value)))
    ),
    "pretraining_tp": _is_token,
    "tie_word_embeddings": _is_flag,
    "rope_theta": _is_number,
    "rope_scaling": _or_none(_is_rope),
    "rope_parameters": _is_rope,
    "attention_bias": _is_flag,
    "attention_dropout": _is_number,
    "mlp_bias": _is_flag,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "transformers_version": _is_text,
    "_name_or_path": _is_text,
    CONFIG_KEY: lambda value: type(value) is dict,
}
