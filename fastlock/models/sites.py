"""The output projections of a model in memory, each checked that it can be folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fastlock.architectures.families import Family, check_lock_fits, family_of_config, head_geometry
from fastlock.dtypes import torch_name
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock
from fastlock.models.projections import Bare, Projection, adapted_projection, base_of, projection_of

# A model's output projections alone: of each layer that is locked W, [hidden, num_heads * head_dim]; or W and c.
BareProjections = dict[int, torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, eq=False)
class Site:
    """One layer's attention output projection.

    Attributes:
        layer: the decoder layer.
        name: the module's path in the model.
        module: the module at that path, or a `Bare`; `models/projections/table.py` lists the types we know. Inside a
            layer of PEFT's, the one whose bias acts.
        num_heads, head_dim: its input is num_heads plain head outputs of head_dim numbers each.
        adapter: PEFT's layer around it, None where there is none.
    """

    layer: int
    name: str
    module: Any
    num_heads: int
    head_dim: int
    adapter: Any = None

    @property
    def outer(self) -> Any:
        """The module that takes the head outputs: PEFT's layer, or the projection itself."""
        return self.module if self.adapter is None else self.adapter

    @property
    def projection(self) -> Projection:
        """What the module's weight lives in."""
        if self.adapter is None:
            return projection_of(self.module)
        return adapted_projection(self.adapter, self.module)

    @property
    def weight(self) -> torch.Tensor:
        """W, [hidden, num_heads * head_dim], detached: a view, whichever way the module keeps it."""
        return self.projection.matrix

    @property
    def bias(self) -> torch.Tensor | None:
        """c, [hidden], or None."""
        return self.projection.bias

    @property
    def dtype_name(self) -> str:
        """The weight's dtype, and its bias's, as a receipt names it: "bfloat16"."""
        return torch_name(self.projection.dtype)

    def head_columns(self, heads: Sequence[int]) -> HeadColumns:
        """The columns of W that these heads' outputs meet."""
        return self.projection.head_columns(heads, self.head_dim)


def unwrapped(model: nn.Module, adapters: bool = False) -> nn.Module:
    """The model itself, out of `torch.compile`'s wrapper.

    Args:
        model: a transformers model.
        adapters: whether it may be PEFT's: then, the model that this is around.

    Raises:
        UnsupportedError: it is not a transformers model, or it is wrapped otherwise, or it carries adapters.
        FastlockError: it is only the inner part of a model.
    """
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    if adapters and is_peft_model(inner):
        inner = cast(Any, inner).get_base_model()
        if (refused := next((kind for kind in _kinds_of(model) if kind in _REFUSED_KINDS), None)) is not None:
            raise UnsupportedError(
                f"{type(model).__name__} carries an adapter of the method {refused}, which acts in more places than "
                "its layers. Merge it if PEFT can (merge_and_unload), then relock."
            )
    if not isinstance(inner, PreTrainedModel):  # a wrapper may have a `config`, too
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model (a PreTrainedModel with a config). "
            f"If it is wrapped (DataParallel, DDP, FSDP, a value head), pass the model inside{_held_by(inner)}."
        )
    if hasattr(inner, "get_base_model") or getattr(inner, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            f"{type(inner).__name__} carries PEFT adapters, and saving it would save the adapters without the lock. "
            "Merge them first (merge_and_unload), then relock."
        )
    if getattr(inner, "base_model", None) is inner:
        raise FastlockError(
            f"{type(inner).__name__} is the inner part of a language model, and the model around it would be saved "
            "without the lock. Pass the whole model (AutoModelForCausalLM loads it)."
        )
    return inner


def is_peft_model(model: object) -> bool:
    """Whether a model is PEFT's, around one of transformers'."""
    if not (hasattr(model, "get_base_model") and hasattr(model, "peft_config")):
        return False
    from transformers import PreTrainedModel

    return not isinstance(model, PreTrainedModel)


# They run a second network, or a second attention, whose outputs no displacement of the base's heads reaches.
_REFUSED_KINDS = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")


def _kinds_of(model: Any) -> list[str]:
    """The methods of a PeftModel's adapters, by PEFT's `peft_type`."""
    configs = getattr(model, "_orig_mod", model).peft_config.values()
    return [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs]


def _held_by(wrapper: object) -> str:
    """Where in a wrapper the model is, for the message: ": its `module`"; nothing where that cannot be told."""
    from transformers import PreTrainedModel

    children = wrapper.named_children() if isinstance(wrapper, nn.Module) else ()
    names = [name for name, child in children if isinstance(child, PreTrainedModel)]
    return f": its `{names[0]}`" if len(names) == 1 else ""


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: the fold would not be exact in it, or nobody has checked whether it is.
    """
    return family_of_config(text_config(model), type(model).__name__)


def text_config(model: nn.Module) -> Any:
    """The config of the decoder: the model's own, or the text part of a multi-modal one."""
    config: Any = model.config
    return config.get_text_config()


def sites(model: nn.Module) -> list[Site]:
    """Every layer's attention output projection, in order; none is checked.

    Raises:
        UnsupportedError: the family is refused or unknown, or the model does not look like its family.
        FastlockError: it is only the inner part of a model.
    """
    model = unwrapped(model, adapters=True)
    family, config = family_of(model), text_config(model)
    num_heads, head_dim = head_geometry(config)
    path, layers = _layers(model, family, config)
    return [
        _site(index, f"{path}.{index}.{family.projection}", layer.get_submodule(family.projection), num_heads, head_dim)
        for index, layer in enumerate(layers)
    ]


def _site(layer: int, name: str, outer: nn.Module, num_heads: int, head_dim: int) -> Site:
    """The site at which this module stands: what is in it, where it is PEFT's."""
    inside = base_of(outer)
    if inside is None:
        return Site(layer, name, outer, num_heads, head_dim)
    return Site(layer, name, inside, num_heads, head_dim, outer)


def _layers(model: nn.Module, family: Family, config: Any) -> tuple[str, nn.ModuleList]:
    """The path of the decoder's list of layers, and the list."""
    lists = [
        (path, layers)
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        and path.rpartition(".")[2] == family.layers
        and len(layers) == config.num_hidden_layers
        and all(_has_submodule(layer, family.projection) for layer in layers)
    ]
    if len(lists) != 1:
        raise UnsupportedError(
            f"{type(model).__name__}: found {len(lists)} lists of {config.num_hidden_layers} layers with "
            f"{family.projection}, where its family ({config.model_type}) has one. It was altered, or is a variant "
            "that fastlock does not know. Load the model as it was published."
        )
    foreign = [type(layer).__module__ for layer in lists[0][1] if not _from_transformers(layer)]
    if foreign:
        raise UnsupportedError(
            f"{type(model).__name__}: its layers come from {foreign[0]}, not from transformers; nobody has checked "
            "that their output projection takes plain concatenated head outputs. Load it without remote code."
        )
    return lists[0]


def _from_transformers(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("transformers.models.")


def _has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def sites_for(model: nn.Module, lock: Lock) -> list[Site]:
    """The sites that the lock shifts, layers ascending, each checked to fit the lock and to be foldable.

    Raises:
        MismatchError: the lock is of another geometry.
        UnsupportedError: a weight cannot be folded (quantised, on the meta device, sharded, shared between layers).
        DamagedError: weights and config do not belong together.
        FastlockError: a projection has locks per request.
    """
    all_sites = sites(model)
    inner = unwrapped(model, adapters=True)
    check_lock_fits(lock, len(all_sites), text_config(inner), type(inner).__name__)
    layers = set(lock.layers.tolist())
    _check_not_shared(all_sites, layers)
    locked = [site for site in all_sites if site.layer in layers]
    for site in locked:
        check_foldable(site)
    return locked


def _check_not_shared(all_sites: Sequence[Site], layers: set[int]) -> None:
    """Refuse a module that is the projection of a locked layer and of another one."""
    owners: dict[int, Site] = {}
    for site in all_sites:
        first = owners.setdefault(id(site.module), site)
        if first is not site and {first.layer, site.layer} & layers:
            raise UnsupportedError(
                f"{site.name} and {first.name} are one module: a bias for one layer would act in the other too. "
                "A model whose layers share their output projection cannot be relocked."
            )


def bare_sites(projections: BareProjections, lock: Lock, name: str) -> list[Site]:
    """The sites that the lock shifts, out of a model's output projections alone, layers ascending; each checked.

    They cannot show that they take plain concatenated head outputs: whoever gives them must know.

    Args:
        projections: of every locked layer at least.
        lock: the lock.
        name: whose they are, for messages.

    Raises:
        FastlockError: the projection of a locked layer is missing, or is not a matrix.
        MismatchError: the lock is of another geometry.
        UnsupportedError: a tensor cannot be folded.
        DamagedError: a bias does not belong to its weight.
    """
    located = []
    for layer in sorted(set(lock.layers.tolist())):
        site = _bare_site(projections.get(layer), layer, lock, f"{name}[{layer}]")
        check_foldable(site)
        _check_bare_fits(site, lock)
        located.append(site)
    return located


def _bare_site(projection: Any, layer: int, lock: Lock, name: str) -> Site:
    pair = projection if isinstance(projection, tuple) and len(projection) == 2 else (projection, None)
    weight, bias = pair
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor | None):
        raise FastlockError(
            f"{name} is {type(projection).__name__}, but the lock shifts this layer. Give the weight of its "
            "output projection, a tensor [hidden, num_heads * head_dim], or a pair of weight and bias."
        )
    if weight.dim() != 2:
        raise FastlockError(
            f"{name}: its weight is {list(weight.shape)}. Give a matrix, [hidden, num_heads * head_dim]."
        )
    columns, head_dim = weight.shape[1], lock.directions.shape[1]
    if columns % head_dim:
        raise MismatchError(
            f"{name}: its weight is {list(weight.shape)}, and {columns} columns cannot be divided into heads of "
            f"{head_dim}, as the lock's are. Use the lock of this model's own aligned base."
        )
    return Site(layer, name, Bare(weight, bias), columns // head_dim, head_dim)


def _check_bare_fits(site: Site, lock: Lock) -> None:
    geometry = {"num_heads": site.num_heads, "hidden_size": site.weight.shape[0]}
    for key, value in geometry.items():
        recorded = getattr(lock, key)
        if recorded not in (None, value):
            raise MismatchError(
                f"{site.name}: its {key} is {value}, but {recorded} in the base of the lock. Use the lock of this "
                "model's own aligned base."
            )
    beyond = [head for head in lock.heads[lock.layers == site.layer].tolist() if head >= site.num_heads]
    if beyond:
        raise MismatchError(
            f"{site.name}: head {beyond[0]} is locked, but it has {site.num_heads} heads. Use the lock of this model's "
            "own aligned base."
        )


def check_foldable(site: Site) -> None:
    """Refuse a site whose projection cannot be folded, or is not of the shape that its config says.

    Raises:
        UnsupportedError: its weights are not there, or not in a form that can be folded.
        DamagedError: weight, bias and config do not belong together.
        FastlockError: it has locks per request.
    """
    site.projection.check(site.name)
    _check_width(site)
    _check_bias(site)


def _check_width(site: Site) -> None:
    shape, width = list(site.projection.shape), site.num_heads * site.head_dim
    if len(shape) != 2 or shape[1] != width:
        raise DamagedError(
            f"{site.name}.weight is {shape}, but its config says {site.num_heads} heads of {site.head_dim}: {width} "
            "columns. The config and the weights do not belong together. Check the model, or download the checkpoint "
            "again."
        )


def _check_bias(site: Site) -> None:
    weight, bias = site.projection, site.bias
    if bias is None:
        return
    if tuple(bias.shape) != weight.shape[:1]:
        raise DamagedError(
            f"{site.name}: bias is {list(bias.shape)}, but the weight has {weight.shape[0]} rows. They do not belong "
            "together. Check the model, or download the checkpoint again."
        )
    if (bias.dtype, bias.device) != (weight.dtype, weight.device):
        raise UnsupportedError(
            f"{site.name}: bias is {bias.dtype} on {bias.device}, weight {weight.dtype} on {weight.device}. Bring the "
            "model to one dtype and the layer to one device first."
        )
