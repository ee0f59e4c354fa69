"""Freezing a band while a model is fine-tuned (Safety Layers' SPPFT), thawing it, and adapters that leave it alone."""

from __future__ import annotations

import gc
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fastlock.errors import FastlockError, UnsupportedError, check_number
from fastlock.finetuning.decoder_layers import band_layers, plain_model
from fastlock.locks.band import Band, check_band
from fastlock.models.reloaded import check_unlocked

if TYPE_CHECKING:
    from peft import LoraConfig

# The attribute of a model that holds what was frozen.
_FROZEN = "_fastlock_frozen"

# What `LoraConfig` could use to reach into a band in spite of `exclude_modules`.
_TAKEN = {
    "exclude_modules": "it is what leaves the band alone",
    "layers_to_transform": "PEFT refuses it together with all-linear, and the band is left alone without it",
    "layers_pattern": "it goes with layers_to_transform",
    "target_modules": "it is `target` here",
    "target_parameters": "PEFT does not exclude modules from it",
}


@dataclass(frozen=True)
class Frozen:
    """What `freeze` did.

    Attributes:
        band: the layers.
        path: of the model's list of layers.
        trained: for each of the band's parameters, by its name in the model, whether it was trained before.
        parameters: how many numbers they hold together.
    """

    band: Band
    path: str
    trained: Mapping[str, bool]
    parameters: int


def freeze(model: nn.Module, band: Band) -> Frozen:
    """Stop the training of whole layers: attention, MLP, norms and biases (SPPFT, arXiv 2408.17003, section 4.1).

    Gradients still flow through the layers. What they have as gradients now is dropped. Freeze first: wrappers (DDP,
    FSDP) and optimizers look at what is trained only once, and both are refused. Every `torch.optim.Optimizer` of the
    process that holds a parameter of the band is found (Python's garbage collector knows them all).

    Args:
        model: a transformers model, `torch.compile`d or not.
        band: the layers.

    Returns:
        What was done, which the model keeps as well, for `thaw`.

    Raises:
        UnsupportedError: the model is wrapped, sharded, carries adapters, or its layers are not one plain list.
        MismatchError: the band lies outside the model, or is of another one.
        FastlockError: the model is relocked, an optimizer already holds the band's parameters, or the model has a
            frozen band already.
    """
    inner = plain_model(model, "frozen")
    found, layers = band_layers(inner, band)
    check_unlocked(inner, "training would change what the lock is folded from")
    if _FROZEN in inner.__dict__:
        raise FastlockError(
            f"{found.name}: its band {inner.__dict__[_FROZEN].band} is frozen already. Call fastlock.thaw(model) first."
        )
    parameters = {f"{path}.{name}": parameter for path, layer in layers for name, parameter in layer.named_parameters()}
    _check_no_optimizer(parameters, found.name)
    frozen = Frozen(
        band,
        found.path,
        {name: parameter.requires_grad for name, parameter in parameters.items()},
        sum(parameter.numel() for parameter in parameters.values()),
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    inner.__dict__[_FROZEN] = frozen
    return frozen


def thaw(model: nn.Module) -> None:
    """Let the band's parameters be trained again: exactly those that were trained before `freeze`.

    Raises:
        UnsupportedError: the model is wrapped.
        FastlockError: nothing is frozen, or the band's parameters were replaced since.
    """
    inner = plain_model(model, "thawed")
    frozen = inner.__dict__.get(_FROZEN)
    if not isinstance(frozen, Frozen):
        raise FastlockError(f"{type(inner).__name__}: no band of it is frozen. fastlock.freeze(model, band) does that.")
    by_name = dict(inner.named_parameters(remove_duplicate=False))
    missing = [name for name in frozen.trained if name not in by_name]
    if missing:
        raise FastlockError(
            f"{type(inner).__name__}: {missing[0]} was frozen, and is no longer there ({len(missing)} in all). Thaw "
            "before you replace or rename modules."
        )
    for name, was_trained in frozen.trained.items():
        by_name[name].requires_grad_(was_trained)
    del inner.__dict__[_FROZEN]


def lora_outside(
    band: Band, r: int = 16, target: str | list[str] = "all-linear", *, model: nn.Module | None = None, **options: Any
) -> LoraConfig:
    """The LoRA that leaves a band alone: no parameter of it gets an adapter (SPPFT with adapters).

    It excludes the band's modules by their names: those of every list of layers of the usual names (layers, h, blocks,
    block, layer), in vision towers too; with a `model`, those of its decoder alone. A mixture of experts needs the
    model, as PEFT adapts experts in spite of what is excluded: there, the attention outside the band gets adapters.

    Args:
        band: the layers.
        r: the rank.
        target: "all-linear", or the names of modules, as PEFT's `target_modules`.
        model: the model that is to be adapted, to check that the band is one of it.
        options: others of `peft.LoraConfig`: lora_alpha, lora_dropout, task_type, …

    Raises:
        MismatchError: the band is not of that model.
        UnsupportedError: PEFT is not installed, or an option would train parameters of the band.
        FastlockError: it is not a band, or the rank is not a positive integer.
    """
    band = check_band(band)
    check_number("r", r, 1, 2**20)
    _check_options(options)
    if importlib.util.find_spec("peft") is None:
        raise UnsupportedError("peft is not installed, and LoRA is its. Install it: pip install peft.")
    from fastlock.finetuning.lora_config import LoraOutsideConfig, has_experts, linear_names

    lists = r"(?:[^.\d][^.]*\.)*?(?:layers|h|blocks?|layer)"
    if model is not None:
        plain = plain_model(model, "adapted")
        found, layers = band_layers(plain, band)
        lists = re.escape(found.path)
        _check_saved(options, [name for path, layer in layers for name in _paths(path, layer)])
        if target == "all-linear" and has_experts(found):
            return LoraOutsideConfig(r=r, target_modules=linear_names(plain, found, band), **options)
    elif options.get("modules_to_save"):
        raise UnsupportedError(
            "`modules_to_save`: PEFT trains whole copies of every module of such a name, perhaps in the band too. Give "
            "the model as well (model=), so that this can be checked; or leave it out."
        )
    # The first number in a name is the layer's; the numbers of its experts come later.
    numbers = "|".join(map(str, band.layers))
    excluded = rf"{lists}\.(?:{numbers})(?:\..*)?"
    return LoraOutsideConfig(r=r, target_modules=target, exclude_modules=excluded, **options)


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options.keys() & _TAKEN.keys():
        if options[name] is not None:
            raise UnsupportedError(f"`{name}` cannot be given to lora_outside: {_TAKEN[name]}. Leave it out.")
    if options.get("bias", "none") == "all":
        raise UnsupportedError(
            'bias="all" would train the biases of the band as well. Give bias="lora_only", or leave it out.'
        )


def _check_saved(options: Mapping[str, Any], inside: list[str]) -> None:
    """Refuse whole modules that are to be trained, and lie in the band."""
    for wanted in options.get("modules_to_save") or ():
        for name in inside:
            if name == wanted or name.endswith(f".{wanted}") or re.match(rf"(^|.*\.){wanted}($|\..*)", name):
                raise UnsupportedError(
                    f"`modules_to_save`: {wanted!r} is also the name of {name}, which lies in the band. Name the "
                    "modules in full, without those of the band."
                )


def _paths(path: str, layer: nn.Module) -> list[str]:
    return [f"{path}.{name}" if name else path for name, _ in layer.named_modules()]


def _check_no_optimizer(parameters: Mapping[str, nn.Parameter], name: str) -> None:
    names = {id(parameter): parameter_name for parameter_name, parameter in parameters.items()}
    if not _holders(names):
        return
    gc.collect()  # of those found, some may be gone but for a circle of references
    for optimizer, held in _holders(names):
        raise FastlockError(
            f"{name}: an optimizer ({optimizer}) already holds {held}, and would go on with the state that it has for "
            "it. Freeze the band before you make the optimizer, or delete the optimizer first."
        )


def _holders(names: Mapping[int, str]) -> list[tuple[str, str]]:
    """The class of every optimizer of the process that holds one of these parameters, and the name of that parameter.

    The types are asked, not the objects: an `isinstance` runs code of whatever proxies the process holds.
    """
    found = []
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Optimizer):
            held = (names.get(id(one)) for group in candidate.param_groups for one in group["params"])
            name = next((name for name in held if name is not None), None)
            if name is not None:
                found.append((type(candidate).__name__, name))
    return found
