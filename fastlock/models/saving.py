"""How a relocked model is saved so that the lock is still there after loading.

A gate is in the weights, which every checkpoint brings back. A bias comes back only if the class that the config names
has a place for it; transformers silently drops any other one. The carrier is the form that has the place: the family's
own config flag (native), or the same model written as a Llama (where that is exact). Where there is neither, saving is
refused.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlock.architectures.bias_paths import keys_that_use_the_bias
from fastlock.architectures.llama_form import llama_config
from fastlock.errors import FastlockError, FastlockWarning, UnsupportedError
from fastlock.locks.receipt import CONFIG_KEY, CarrierNote, Receipt, SavedReceipt, raw_bytes
from fastlock.models.columns import note_copy
from fastlock.models.sites import Site, family_of
from fastlock.models.state import ORIGINAL_BIAS, RECEIPT, flag_before, locked_sites, with_digests_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Swapped:
    """What a swapped class needs to survive deepcopy and pickle: it can be rebuilt from its two bases."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_swapped, type(self).__bases__, self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        model: Any = self
        note_copy(model)


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
            UnsupportedError: the model's family has no place for the bias, or tensors are offloaded.
            FastlockError: the place is a file, or the `state_dict` is not the model's. Nothing is written.
        """
        if Path(save_directory).is_file():
            raise FastlockError(f"{save_directory}: is a file. Give a directory to save into.")
        model: Any = self
        carried_model(model, state_dict).save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """`Module.state_dict`; it warns where the model's own class would drop the lock's biases when they are loaded.

        What is written from it elsewhere (`torch.save`, safetensors, accelerate) does not come through
        `save_pretrained`, and no config of the family asks for the biases.
        """
        model: Any = self
        if family_of(model).bias_flag is None and getattr(model, RECEIPT).constant:
            warnings.warn(
                f"{type(model).__name__} is relocked, and its state_dict holds biases that this class drops when it "
                "loads them, and the lock with them. To write it to disk, use model.save_pretrained, which keeps the "
                "lock.",
                FastlockWarning,
                stacklevel=2,
            )
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]


class PartOfRelocked(_Swapped):
    """What the inner models of a relocked model gain: saving one of them alone would silently drop the lock."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Refuse: only the whole model can be saved with its lock.

        Raises:
            FastlockError: always.
        """
        raise FastlockError(
            f"{type(self).__name__} is the inner part of a relocked model, and saving it alone would lose the lock. "
            "Save the whole model, or unlock it first. Nothing was saved."
        )


class AroundRelocked(_Swapped):
    """What PEFT's model around a relocked one gains: it would save its adapters, and the lock is in their base."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """`PeftModel.save_pretrained`, while its base is not relocked.

        Raises:
            FastlockError: it is.
        """
        model: Any = self
        if RECEIPT in model.get_base_model().__dict__:
            raise FastlockError(
                f"{type(model).__name__} saves its adapters alone, and the lock is in their base: it would be lost. "
                "Nothing was saved. Save after fastlock.unlock(model), then relock the saved adapter on disk "
                "(fastlock relock ADAPTER --base BASE); or merge the adapters, and save the whole model."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


@cache
def swapped_class(gained: type, cls: type) -> type:
    """A class of the same name and module as `cls`, with `gained` in front of it."""
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

    Args:
        model: a relocked model.
        state: its state_dict, or the same numbers gathered elsewhere; by default its own.

    Raises:
        UnsupportedError: no class has a place for the biases, or tensors are offloaded.
        FastlockError: `state` lacks a bias, or has other numbers for a locked one than the model.
    """
    config, cls = _carrier_of(model)
    cls_before: Any = unlocked_class(type(model))
    own = cls_before.state_dict(model)  # without the warning: what is made of it keeps the lock
    state = own if state is None else state
    _check_state(model, own, state)
    try:
        carried = in_class(cls, config, state)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be saved without losing something: {cls.__name__} has no exact place for "
            f"all of its tensors ({error}). unlock(model) saves as before; relock again after loading."
        ) from None
    if model.can_generate():
        carried.generation_config = model.generation_config
    return carried


def _check_state(model: PreTrainedModel, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Refuse a state_dict that is not the model's `own`, as far as biases can tell."""
    if offloaded := [name for name, tensor in state.items() if tensor.device.type == "meta"]:
        raise UnsupportedError(
            f"{type(model).__name__}: {offloaded[0]} is offloaded, and cannot be saved with the lock. Load the whole "
            "model into memory to save it. Nothing was saved."
        )
    receipt: Receipt = getattr(model, RECEIPT)
    for site in locked_sites(model, receipt):
        if receipt.rank:
            _check_weight(site, state.get(f"{site.name}.weight"))
        if not receipt.constant:
            continue
        name, bias = f"{site.name}.bias", site.bias
        saved = state.get(name)
        if saved is None:
            raise FastlockError(
                f"the state_dict lacks {name}, which is the lock. Nothing was saved. Give the model's own state_dict."
            )
        if bias is None or saved.dtype != bias.dtype or not torch.equal(saved.to(bias.device), bias):
            raise FastlockError(
                f"the state_dict has other numbers for {name} than the relocked model, or another dtype: the lock "
                "would be lost. Nothing was saved. Give the model's own state_dict; to save in another dtype, convert "
                "the model, and relock it."
            )
    if missing := [name for name in own if name.endswith(".bias") and name not in state]:
        raise FastlockError(f"the state_dict lacks {missing[0]}. Nothing was saved. Give the model's own state_dict.")


def _check_weight(site: Site, saved: torch.Tensor | None) -> None:
    """Refuse a state_dict without the weight that holds a gate."""
    weight: torch.Tensor = site.module.weight
    if saved is None or saved.dtype != weight.dtype or not torch.equal(saved.to(weight.device), weight):
        raise FastlockError(
            f"the state_dict does not have the numbers of {site.name}.weight that the relocked model has, or has them "
            "in another dtype: the lock would be lost. Nothing was saved. Give the model's own state_dict; to save in "
            "another dtype, unlock the model, convert it, and relock it."
        )


def in_class(cls: Callable[[Any], PreTrainedModel], config: Any, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of a class and config on the storage of `state`; biases that `state` lacks become zeros.

    Raises:
        RuntimeError: a tensor has no place, or a place has no tensor.
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
        model.tie_weights()  # not otherwise: what a merged adapter made of one of them would be lost
    return model


def _tied(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """The tensors that the config says are one, in pairs."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return [(one, other) for one, other in pairs.items() if one in state and other in state]


def _carrier_of(model: PreTrainedModel) -> tuple[Any, Callable[[Any], PreTrainedModel]]:
    """The config and class that carry the lock, the receipt written into the config."""
    receipt: Receipt = getattr(model, RECEIPT)
    sites = locked_sites(model, receipt)
    if quantised := [site.name for site in sites if not site.projection.in_place]:
        raise UnsupportedError(
            f"{type(model).__name__}: {quantised[0]} is quantised or adapted, and saving it would lose the lock. "
            "Nothing was saved. unlock(model) saves as before; then relock the saved checkpoint on disk "
            "(fastlock.relock_checkpoint)."
        )
    receipt = with_digests_of(receipt.converted([site.dtype_name for site in sites]), sites)
    family, config = family_of(model), copy.deepcopy(model.config)
    config.dtype = config.get_text_config().dtype = model.dtype  # an earlier save left a string, which no class takes
    config.__dict__.pop("quantization_config", None)  # of a GGUF that loading dequantised: what is saved is plain
    cls: Callable[[Any], PreTrainedModel] = unlocked_class(type(model))
    biases = {site.layer: getattr(site.module, ORIGINAL_BIAS) for site in sites if hasattr(site.module, ORIGINAL_BIAS)}
    own_biases = any(bias.count_nonzero() for bias in biases.values())
    if not receipt.constant:
        carrier = CarrierNote("weights", "", True)
    elif family.bias_flag is None:
        if own_biases:
            raise UnsupportedError(
                f"{type(model).__name__}: its output projections had biases before it was relocked, and its own class "
                "has no place for them: the saved checkpoint could not be unlocked. Nothing was saved. Set them to "
                "None, then relock and save."
            )
        original = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
        carrier = CarrierNote("llama", "attention_bias", config.model_type == "qwen2", original_config=original)
        config, cls = _llama_form(model, config)
    elif family.bias_flag:
        text = config.get_text_config()
        # Biases that somebody put in by hand are the model's own, whatever its config says.
        was = flag_before(model, family.bias_flag) or own_biases
        carrier = CarrierNote("native", family.bias_flag, was)
        keys = text.to_dict() | {family.bias_flag: was}
        for key, value in keys_that_use_the_bias(text.model_type, keys, type(model).__name__).items():
            setattr(text, key, value)
        setattr(text, family.bias_flag, True)
    else:
        carrier = CarrierNote("native", "", True)
    if receipt.original_config is not None:
        carrier = replace(carrier, form="llama", original_config=receipt.original_config)
    carrier = replace(carrier, original_biases={layer: raw_bytes(bias) for layer, bias in biases.items()})
    setattr(config, CONFIG_KEY, SavedReceipt(receipt, carrier).to_dict())
    return config, cls


def _llama_form(model: PreTrainedModel, config: Any) -> tuple[Any, Callable[[Any], PreTrainedModel]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    works = (
        "Nothing was saved. What works: unlock(model), save as before, and relock again after loading, "
        "with the lock shipped beside the checkpoint."
    )
    llama = LlamaConfig(**llama_config(config, config.to_dict(), type(model).__name__, works))
    llama.dtype = config.dtype
    return llama, LlamaForCausalLM
