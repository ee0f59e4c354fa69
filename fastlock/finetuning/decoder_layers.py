"""The decoder's layers of a model in memory, as a plain list that bands count in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlock.architectures.families import FAMILIES
from fastlock.errors import UnsupportedError
from fastlock.locks.band import Band, check_band, check_band_fits

# By the class's name: what runs a model in several processes, or holds its parameters in a form of its own.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule")


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder's layers.

    Attributes:
        name: the model's class, for messages.
        path: of the list in the model ("model.layers").
        model_type: the decoder's family.
        layers: in order.
    """

    name: str
    path: str
    model_type: str
    layers: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def of(self, band: Band) -> list[tuple[str, nn.Module]]:
        """The band's layers with their paths.

        Raises:
            MismatchError: the band is not of this model.
        """
        check_band_fits(band, len(self), self.model_type, self.name)
        return [(f"{self.path}.{number}", self.layers[number]) for number in band.layers]


def plain_model(model: nn.Module, doing: str) -> Any:
    """The transformers model itself, out of `torch.compile`'s wrapper.

    Args:
        model: what was given.
        doing: what is to be done with it, for messages ("frozen").

    Raises:
        UnsupportedError: it is wrapped for training, sharded, carries adapters, or is no transformers model.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    wrapped = next((module for module in _modules(inner) if _wraps(module, FSDPModule)), None)
    if wrapped is not None:
        raise UnsupportedError(
            f"{type(inner).__name__}: it is wrapped ({type(wrapped).__name__}). Wrappers look at which parameters are "
            f"trained only once. Give the model itself: it must be {doing} before it is wrapped."
        )
    if hasattr(inner, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            f"{type(inner).__name__}: it carries PEFT adapters, and cannot be {doing}. Merge them first "
            "(merge_and_unload); to train adapters outside a band, make them with fastlock.lora_outside(band)."
        )
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedError(
            f"{type(inner).__name__} is not a transformers model (a PreTrainedModel with a config). Give that."
        )
    return inner


def decoder_layers(model: Any) -> DecoderLayers:
    """The decoder's layers of a plain model.

    Raises:
        UnsupportedError: they are not one plain list, or share parameters with each other or with the rest.
    """
    config = model.config.get_text_config()
    name, model_type = type(model).__name__, str(config.model_type)
    count = getattr(config, "num_hidden_layers", None)
    family = FAMILIES.get(model_type)
    lists = [
        (path, modules)
        for path, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        and len(modules) == count
        and not any(part.isdigit() for part in path.split("."))  # a layer's own experts
        and (family is None or path.rpartition(".")[2] == family.layers)
    ]
    if family is not None and len(lists) > 1:  # the layers of a vision tower may be as many
        lists = [one for one in lists if all(_has(layer, family.projection) for layer in one[1])]
    if len(lists) != 1:
        raise UnsupportedError(
            f"{name} ({model_type}): a band is a part of one plain list of decoder layers, and this model has "
            f"{len(lists)} lists of {count} layers. Bands cannot be used with this family."
        )
    path, layers = lists[0]
    _check_not_shared(model, name, path, tuple(layers))
    return DecoderLayers(name, path, model_type, tuple(layers))


def band_layers(model: Any, band: Band) -> tuple[DecoderLayers, list[tuple[str, nn.Module]]]:
    """The layers of a plain model, and those of a band in it with their paths.

    Raises:
        UnsupportedError: the model's layers are not one plain list.
        MismatchError: the band is not of this model.
        FastlockError: it is not a band.
    """
    found = decoder_layers(model)
    return found, found.of(check_band(band))


def _check_not_shared(model: Any, name: str, path: str, layers: tuple[nn.Module, ...]) -> None:
    owners: dict[int, str] = {}
    for owner, module in ((f"{path}.{number}", layer) for number, layer in enumerate(layers)):
        for parameter in module.parameters():
            first = owners.setdefault(id(parameter), owner)
            if first != owner:
                raise UnsupportedError(
                    f"{name}: {first} and {owner} share a parameter, and what is done to one layer would be done to "
                    "the other too. Bands cannot be used with this model."
                )
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners and not parameter_name.startswith(f"{path}."):
            raise UnsupportedError(
                f"{name}: {parameter_name} is also a parameter of {owners[id(parameter)]}. Untie them first; what is "
                "done to a band must leave the rest alone."
            )


def _modules(model: object) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _wraps(module: nn.Module, sharded: type) -> bool:
    return isinstance(module, sharded) or any(base.__name__ in _WRAPPERS for base in type(module).__mro__)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
