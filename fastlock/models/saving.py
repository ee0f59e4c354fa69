"""How a relocked model is saved so that the lock is still there after loading.

A checkpoint brings a bias back only if the class that its config names has a place for it; transformers drops any
other bias in silence. The carrier is the form that has the place: the family's own config flag (native), or the
same model written as a Llama (where that is exact). Where there is neither, saving is refused.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlock.architectures.serving_stacks import STACKS, acts, architecture, named_architecture, native_flag, needs
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.errors import FastlockError
from fastlock.locks.receipt import Receipt, raw_bytes
from fastlock.models.sites import ATTENTION, Site, family_of, head_geometry
from fastlock.models.sites import sites as every_site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECEIPT = "_fastlock"
# Buffers beside a locked projection, so that they move with it: what was there before, and what the lock put there.
ORIGINAL_BIAS = "fastlock_original_bias"
PLACED_BIAS = "fastlock_placed_bias"
CONFIG_KEY = "fastlock"

# The families that can be written as a Llama, and the class that can.
LLAMA_FORM = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# What a Llama's config does not share with that of a Mistral or Qwen2 which has no sliding window.
_NOT_OF_LLAMA = (
    "model_type architectures sliding_window use_sliding_window max_window_layers layer_types head_dim"
).split()
_LLAMA_TENSOR = re.compile(
    r"(model\.embed_tokens|model\.norm|lm_head)\.weight|model\.layers\.\d+\.("
    r"self_attn\.[qkvo]_proj\.(weight|bias)|mlp\.(gate|up|down)_proj\.weight|(input|post_attention)_layernorm\.weight)"
)


class _Swapped:
    """What a swapped class needs to survive deepcopy and pickle: it is made anew from its two bases."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_swapped, type(self).__bases__, self.__dict__


class Relocked(_Swapped):
    """What a relocked model's class gains: saving that keeps the lock.

    The model's own class is swapped for one that inherits from this and from it, as PyTorch's parametrizations and
    `fully_shard` do: unlike a patched method it survives deepcopy and pickle and makes no reference cycle.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, in a form that brings the lock back when loaded: see `carried_model`.

        Raises:
            FastlockError: the model's family has no place for the bias; nothing is written.
        """
        if Path(save_directory).is_file():
            raise FastlockError(f"{save_directory}: is a file; give a directory to save into.")
        model: Any = self
        carried_model(model, state_dict).save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


class PartOfRelocked(_Swapped):
    """What the inner models of a relocked model gain: saving one of them alone would drop the lock in silence."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Refuse: the whole model is what can be saved with its lock."""
        raise FastlockError(
            f"{type(self).__name__} is the inner part of a relocked model, and saving it alone would lose the lock. "
            "Save the whole model, or unlock it first. Nothing was saved."
        )


@cache
def swapped_class(gained: type, cls: type) -> type:
    """A class of the same name and module with `gained` in front of `cls`."""
    return type(cls.__name__, (gained, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def unlocked_class(cls: type) -> type:
    """The class that a relocked model's class was made from."""
    return cls.__bases__[1] if issubclass(cls, _Swapped) else cls


def _new_swapped(gained: type, cls: type) -> Any:
    return object.__new__(swapped_class(gained, cls))


def carried_model(model: PreTrainedModel, state: dict[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """The same model on the same storage, in the class and config that carry its biases through a checkpoint.

    Filling it strictly is the proof that nothing is lost: every tensor of the model has a place in the class that
    the config names, and every place is filled, with zeros where the config's flag asks for further biases.

    Raises:
        FastlockError: no class has a place for the bias.
    """
    config, cls = _carrier_of(model)
    own = model.state_dict()
    state = own if state is None else state
    if missing := [name for name, tensor in state.items() if tensor.device.type == "meta"]:
        raise FastlockError(
            f"{type(model).__name__}: {missing[0]} is offloaded, so that it can't be saved with the lock. "
            "Load the whole model into memory to save it. Nothing was saved."
        )
    for site in locked_sites(model, getattr(model, RECEIPT)):
        given = state.get(f"{site.name}.bias")
        if given is None:
            raise FastlockError(
                f"the state_dict lacks {site.name}.bias, which is the lock. Nothing was saved. Give the model's own."
            )
        bias = site.bias
        if bias is None or given.dtype != bias.dtype or not torch.equal(given.to(bias.device), bias):
            raise FastlockError(
                f"the state_dict has other numbers for {site.name}.bias than the relocked model, or another dtype, so "
                "that the lock would be lost. Nothing was saved. Give the model's own state_dict; to save in another "
                "dtype, convert the model, and relock it."
            )
    if missing := [name for name in own if name.endswith(".bias") and name not in state]:
        raise FastlockError(f"the state_dict lacks {missing[0]}. Nothing was saved. Give the model's own.")
    try:
        carried = in_class(cls, config, state)
    except (RuntimeError, TypeError) as error:
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
    if all(torch.equal(state[one], state[other]) for one, other in _tied(model, state)):
        model.tie_weights()  # else what a merged adapter made of one of them would be lost
    return model


def _tied(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """The tensors that the config says are one, in pairs."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return [(one, other) for one, other in pairs.items() if one in state and other in state]


def _carrier_of(model: PreTrainedModel) -> tuple[Any, Callable[[Any], PreTrainedModel]]:
    """The config and class that carry the lock, the receipt written into the config."""
    receipt: Receipt = getattr(model, RECEIPT)
    sites = locked_sites(model, receipt)
    receipt = replace(receipt, dtype=sites[0].dtype_name).of(sites)
    family, config = family_of(model), copy.deepcopy(model.config)
    config.dtype = config.get_text_config().dtype = model.dtype  # an earlier save left a string, which no class takes
    config.__dict__.pop("quantization_config", None)  # a GGUF's, dequantised in loading: what is saved is plain
    cls: Callable[[Any], PreTrainedModel] = unlocked_class(type(model))
    note: dict[str, Any]
    if family.bias_flag is None:
        note = {"form": "llama", "flag": "attention_bias", "was": config.model_type == "qwen2"}
        note["original_config"] = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
        config, cls = _llama_form(model, config)
    elif family.bias_flag:
        text = config.get_text_config()
        note = {"form": "native", "flag": family.bias_flag, "was": bool(getattr(text, family.bias_flag))}
        setattr(text, family.bias_flag, True)
    else:
        note = {"form": "native", "flag": "", "was": True}
    if receipt.original_config is not None:
        note |= {"form": "llama", "original_config": receipt.original_config}
    note["original_biases"] = {
        str(site.layer): base64.b64encode(raw_bytes(getattr(site.module, ORIGINAL_BIAS))).decode()
        for site in sites
        if hasattr(site.module, ORIGINAL_BIAS)
    }
    setattr(config, CONFIG_KEY, receipt.to_dict() | {"carrier": note})
    return config, cls


def locked_sites(model: nn.Module, receipt: Receipt) -> list[Site]:
    """The sites that a receipt names."""
    by_layer = {site.layer: site for site in every_site(model)}
    tail = f"{family_of(model).layers}.{{}}.{family_of(model).projection}"  # a file may have other names above it
    missing = [
        site for site in receipt.sites if site.layer not in by_layer or not site.name.endswith(tail.format(site.layer))
    ]
    if missing:
        raise FastlockError(
            f"the receipt names {missing[0].name}, which {type(model).__name__} does not have. "
            "The receipt belongs to another model: relock the original checkpoint."
        )
    return [by_layer[site.layer] for site in receipt.sites]


def _llama_form(model: PreTrainedModel, config: Any) -> tuple[Any, Callable[[Any], PreTrainedModel]]:
    from transformers import LlamaForCausalLM

    works = (
        "Nothing was saved. What works: unlock(model), save as before, and relock again after loading, "
        "with the lock shipped beside the checkpoint."
    )
    return llama_config(config, type(model).__name__, works), LlamaForCausalLM


def llama_config(config: Any, name: str, works: str) -> Any:
    """The config under which a Mistral or Qwen2 is computed by Llama's code, with a place for the bias.

    Args:
        config: the model's own.
        name: its class, for messages.
        works: what would work instead, for messages.

    Raises:
        FastlockError: it would not be the same model, to the bit.
    """
    from transformers import LlamaConfig

    lost = f"{name}: transformers has no place for an output projection bias in a {config.model_type} checkpoint"
    if LLAMA_FORM.get(config.model_type) != name:
        raise FastlockError(f"{lost} and would drop the lock in silence when loading it. {works}")
    if (window := active_window(config)) is not None:
        raise FastlockError(
            f"{lost}, and the Llama form is not exact with a sliding window of {window} tokens. {works} If the model "
            "is never run beyond that window, set config.sliding_window = None and save again."
        )
    keys = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_LLAMA}
    _, head_dim = head_geometry(config)
    try:
        llama = LlamaConfig(**keys | {"head_dim": head_dim, "mlp_bias": False, "attention_bias": True})
    except (ValueError, TypeError) as error:
        raise FastlockError(f"{lost}, and a Llama can't have this config ({error}). {works}") from None
    llama.dtype = config.dtype
    return llama


def active_window(config: Any) -> int | None:
    """The sliding window of a Mistral or Qwen2; None where no layer has one."""
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and "sliding_attention" not in config.layer_types:
        return None
    return window


@dataclass(frozen=True)
class Carrier:
    """How a checkpoint on disk brings the biases to the stacks that are asked for.

    Attributes:
        form: "native", or "llama".
        flag: the config key that switches the biases on; "" where they always are.
        was: whether it was on before.
        config: the new config.json, without a receipt; its architecture is another one where a stack needs that.
        switched: the modules of a layer that then need a bias, zeros included; "lm_head" is the model's.
    """

    form: str
    flag: str
    was: bool
    config: dict[str, Any]
    switched: tuple[str, ...]


def check_stacks(stacks: Sequence[str]) -> tuple[str, ...]:
    """The stacks asked for, each once.

    Raises:
        FastlockError: there are none, or one is unknown.
    """
    if isinstance(stacks, str) or not stacks or any(stack not in STACKS for stack in stacks):
        raise FastlockError(f"stacks {stacks!r}: give a list of serving stacks, of {', '.join(STACKS)}.")
    return tuple(dict.fromkeys(stacks))


def choose_carrier(checkpoint: Checkpoint, stacks: tuple[str, ...]) -> Carrier:
    """The carrier that acts in every one of these stacks: the family's own bias, else the Llama form.

    Raises:
        FastlockError: there is none; it names the stack that would lose the lock, and what would work.
    """
    kind, asked = checkpoint.kind, set(stacks)
    native = acts(kind)
    if "transformers" in native and asked <= native:
        return _native(checkpoint, stacks, checkpoint.family.bias_flag or "")
    if kind in LLAMA_FORM and asked <= acts("llama"):
        architecture = (checkpoint.raw.get("architectures") or [LLAMA_FORM[kind]])[0]
        try:
            return _as_llama(checkpoint, str(architecture))
        except FastlockError:
            if not asked <= native:
                raise
    if asked <= native:
        flags = {native_flag(kind, stack) for stack in stacks}
        if len(flags) == 1:
            return _native(checkpoint, stacks, flags.pop() or "")
    losing = ", ".join(stack for stack in stacks if stack not in native)
    raise FastlockError(
        f"{checkpoint.where}: {losing or ' and '.join(stacks)} would lose the lock in a {kind} checkpoint, in silence. "
        f"{_what_works(native)} Nothing was written."
    )


def _what_works(native: frozenset[str]) -> str:
    if not native:
        return "No stack has a place for it: relock in memory after loading (fastlock.relock)."
    return f"What works: --for {','.join(stack for stack in STACKS if stack in native)}."


def _native(checkpoint: Checkpoint, stacks: tuple[str, ...], flag: str) -> Carrier:
    config = copy.deepcopy(checkpoint.raw)
    text = config if checkpoint.text_key is None else config.setdefault(checkpoint.text_key, {})
    was = not flag or bool(getattr(checkpoint.text_config, flag, False))
    switched = checkpoint.family.switched if flag and flag == checkpoint.family.bias_flag else ()
    switched += tuple(name for stack in stacks for name in needs(checkpoint.kind, stack))
    if flag:
        text[flag] = True
    if (needed := _architecture(checkpoint, stacks)) is not None:
        config["architectures"] = [needed]
    _drop_remote_code(config)
    return Carrier("native", flag, was, config, tuple(dict.fromkeys(switched)))


def _architecture(checkpoint: Checkpoint, stacks: tuple[str, ...]) -> str | None:
    """The architecture that config.json must name for all of these stacks, None where it need not be changed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    needed = next((name for stack in stacks if (name := architecture(checkpoint.kind, stack)) is not None), None)
    if needed is None:
        return None
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.kind]
    if named_architecture(checkpoint.raw) not in (None, own, needed):
        raise FastlockError(
            f"{checkpoint.where}: vllm's own code would lose the lock in a {checkpoint.kind} checkpoint, in silence, "
            f"and {needed}, which keeps it, is for {own} alone. What works: --for transformers. Nothing was written."
        )
    if others := set(stacks) - {"transformers", "vllm"}:
        raise FastlockError(
            f"{checkpoint.where}: vllm keeps the lock in a {checkpoint.kind} checkpoint where config.json names "
            f"{needed}, which {' and '.join(sorted(others))} would not take: relock it twice, once for each. Nothing "
            "was written."
        )
    return needed


def _as_llama(checkpoint: Checkpoint, architecture: str) -> Carrier:
    works = "What works: relock in memory after loading (fastlock.relock). Nothing was written."
    llama = llama_config(checkpoint.config, architecture, works)
    if foreign := [name for name in checkpoint.shards.tensors if not _LLAMA_TENSOR.fullmatch(name)]:
        raise FastlockError(f"{checkpoint.where}: {foreign[0][:200]!a} has no place in the Llama form. {works}")
    config = json.loads(llama.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    return Carrier("llama", "attention_bias", checkpoint.kind == "qwen2", config, ATTENTION)


def _drop_remote_code(config: dict[str, Any]) -> None:
    """Code of the checkpoint's own may have no place for the bias; without it, transformers' own class is used."""
    mapped = config.get("auto_map")
    if isinstance(mapped, dict):
        kept = {key: value for key, value in mapped.items() if key.startswith("AutoTokenizer")}
        config.pop("auto_map")
        if kept:
            config["auto_map"] = kept
