"""How a relocked model is saved so that the lock is still there after loading.

A checkpoint brings a bias back only if the class that its config names has a place for it; transformers drops any
other bias in silence. The carrier is the form that has the place: the family's own config flag (native), or the
same model written as a Llama (where that is exact). Where there is neither, saving is refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.files import write_atomic
from fastlock.receipt import Receipt
from fastlock.sites import Family, family_of, sites, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "_fastlock"
ORIGINAL_BIAS = "fastlock_original_bias"
CONFIG_KEY = "fastlock"
ORIGINALS_FILE = "fastlock/original_biases.safetensors"

# Mistral and Qwen2 without an active sliding window compute what Llama computes from these keys.
_LLAMA_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings rope_parameters attention_dropout dtype"
).split()


class Relocked:
    """What a relocked model's class gains: saving that keeps the lock.

    The model's own class is swapped for one that inherits from this and from it, as PyTorch's parametrizations and
    `fully_shard` do: unlike a patched method it survives deepcopy and pickle and makes no reference cycle.
    """

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, in a form that brings the lock back when loaded (see fastlock.carrier)."""
        save(self, save_directory, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_relocked, (unlocked_class(type(self)),), self.__dict__


@cache
def relocked_class(cls: type) -> type:
    """The class of a relocked model of this class: same name, same module, `Relocked` in front."""
    return type(cls.__name__, (Relocked, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def unlocked_class(cls: type) -> type:
    """The class that a relocked model's class was made from."""
    return cls.__bases__[1] if issubclass(cls, Relocked) else cls


def _new_relocked(cls: type) -> Any:
    return object.__new__(relocked_class(cls))


def save(model: PreTrainedModel, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a relocked model so that `from_pretrained` gives it back, lock and all.

    Args:
        model: a relocked model.
        directory: where to.
        **kwargs: what `PreTrainedModel.save_pretrained` takes.

    Raises:
        FastlockError: its family has no place for the bias; nothing is written.
    """
    if kwargs.get("push_to_hub"):
        raise FastlockError(
            "save_pretrained(push_to_hub=True) would leave out the file that unlocking needs. "
            "Use model.push_to_hub(...), or save first and upload the directory."
        )
    carried = carried_model(model, kwargs.pop("state_dict", None))
    originals = {
        site.name: getattr(site.module, ORIGINAL_BIAS) for site in sites(model) if hasattr(site.module, ORIGINAL_BIAS)
    }
    directory = Path(directory)
    if originals and kwargs.get("is_main_process", True):
        (directory / ORIGINALS_FILE).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / ORIGINALS_FILE, safetensors.torch.save(originals))
    carried.save_pretrained(directory, **kwargs)


def carried_model(model: PreTrainedModel, state: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """The same model on the same storage, in the class and config that carry its biases through a checkpoint.

    Filling it strictly is the proof that nothing is lost: every tensor of the model has a place in the class that
    the config names, and every place is filled, with zeros where the config's flag asks for further biases.

    Raises:
        FastlockError: no class has a place for the bias.
    """
    config, cls = _carrier_of(model)
    state = model.state_dict() if state is None else state
    if missing := [name for name, tensor in state.items() if tensor.device.type == "meta"]:
        raise FastlockError(
            f"{type(model).__name__}: {missing[0]} is offloaded, so that it can't be saved with the lock. "
            "Load the whole model into memory to save it. Nothing was saved."
        )
    if lacking := [s.name for s in getattr(model, RECORD).sites if f"{s.name}.bias" not in state]:
        raise FastlockError(f"the state_dict lacks {lacking[0]}.bias, which is the lock. Nothing was saved.")
    try:
        carried = in_class(cls, config, state)
    except RuntimeError as error:
        raise FastlockError(
            f"{type(model).__name__} can't be saved without losing something: {cls.__name__} has no exact place for "
            f"all of its tensors ({error}). unlock(model) saves as before; relock again after loading."
        ) from None
    if model.can_generate():
        carried.generation_config = model.generation_config
    return carried


def in_class(cls: Callable[[Any], PreTrainedModel], config: Any, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of a class and config on the storage of `state`; biases that `state` lacks become zeros.

    Raises:
        RuntimeError: a tensor has no place, or a place no tensor.
    """
    state = dict(state)
    with torch.device("meta"):
        model = cls(config)
    places = model.state_dict()
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    for name in places.keys() - state.keys():
        if name.endswith(".bias"):
            state[name] = torch.zeros(places[name].shape, dtype=dtype, device="cpu")
    model.load_state_dict(state, assign=True, strict=True)
    model.tie_weights()
    return model.eval()


def _carrier_of(model: PreTrainedModel) -> tuple[Any, Callable[[Any], PreTrainedModel]]:
    """The config and class that carry the lock, the receipt written into the config."""
    receipt: Receipt = getattr(model, RECORD)
    family, config = family_of(model), copy.deepcopy(model.config)
    config.dtype = config.get_text_config().dtype = model.dtype  # an earlier save left a string, which no class takes
    config.__dict__.pop("quantization_config", None)  # a GGUF's, dequantised in loading: what is saved is plain
    was = has_flag(family, config)
    note: dict[str, Any] = {"form": "native", "flag": family.bias_flag, "was": was}
    cls: Callable[[Any], PreTrainedModel] = unlocked_class(type(model))
    if family.bias_flag is None:
        note = {"form": "llama", "flag": "attention_bias", "was": text_config(model).model_type == "qwen2"}
        note["original_config"] = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
        config, cls = _llama_form(model, config)
        setattr(config, note["flag"], True)
    elif family.bias_flag:
        setattr(config.get_text_config(), family.bias_flag, True)
    setattr(config, CONFIG_KEY, receipt.of(locked_sites(model, receipt)).to_dict() | {"carrier": note})
    return config, cls


def has_flag(family: Family, config: Any) -> bool:
    """Whether the config gives the output projection a bias as it stands."""
    if family.bias_flag is None:
        return False
    return bool(getattr(config.get_text_config(), family.bias_flag)) if family.bias_flag else True


def locked_sites(model: nn.Module, receipt: Receipt) -> list[Any]:
    """The sites that a receipt names."""
    by_layer = {site.layer: site for site in sites(model)}
    missing = [site for site in receipt.sites if site.layer not in by_layer or by_layer[site.layer].name != site.name]
    if missing:
        raise FastlockError(
            f"the receipt names {missing[0].name}, which {type(model).__name__} does not have. "
            "The receipt belongs to another model: relock the original checkpoint."
        )
    return [by_layer[site.layer] for site in receipt.sites]


def _llama_form(model: PreTrainedModel, config: Any) -> tuple[Any, Callable[[Any], PreTrainedModel]]:
    from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

    kind, name = config.model_type, type(model).__name__
    lost = f"{name}: transformers has no place for an output projection bias in a {kind} checkpoint"
    works = (
        "Nothing was saved. What works: unlock(model), save as before, and relock again after loading, "
        "with the lock shipped beside the checkpoint."
    )
    if not isinstance(model, (MistralForCausalLM, Qwen2ForCausalLM)):
        raise FastlockError(f"{lost} and would drop the lock in silence when loading it. {works}")
    if (window := active_window(config)) is not None:
        raise FastlockError(
            f"{lost}, and the Llama form is not exact with a sliding window of {window} tokens. {works} If the model "
            "is never run beyond that window, set config.sliding_window = None and save again."
        )
    keys = {key: getattr(config, key) for key in _LLAMA_KEYS if hasattr(config, key)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        llama = LlamaConfig(**keys, head_dim=head_dim, mlp_bias=False, attention_bias=True)
    except (ValueError, TypeError) as error:
        raise FastlockError(f"{lost}, and a Llama can't have this config ({error}). {works}") from None
    return llama, LlamaForCausalLM


def active_window(config: Any) -> int | None:
    """The sliding window of a Mistral or Qwen2, if it acts within the model's own context length."""
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and "sliding_attention" not in config.layer_types:
        return None
    return None if window is None or window >= config.max_position_embeddings else window
