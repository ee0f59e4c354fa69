"""The output projections of a model in memory, each checked that it can be folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.architectures.families import Family, check_lock_fits, family_of_config, head_geometry
from fastlock.errors import FastlockError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock

# The dtypes of weights that can be folded, by the names that receipts give them.
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True, eq=False)
class Bare:
    """An output projection without its model: the tensors alone.

    Attributes:
        weight: W, [hidden, num_heads * head_dim].
        bias: c, [hidden], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


# A model's output projections alone: of each layer that is locked W, [hidden, num_heads * head_dim]; or W and c.
Projections = dict[int, torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, eq=False)
class Site:
    """One layer's attention output projection.

    Attributes:
        layer: the decoder layer.
        name: the module's path in the model.
        module: an `nn.Linear`, or transformers' `Conv1D` (GPT-2), which keeps its weight transposed; or a `Bare`.
        num_heads, head_dim: its input is num_heads plain head outputs of head_dim numbers each.
    """

    layer: int
    name: str
    module: Any
    num_heads: int
    head_dim: int

    @property
    def weight(self) -> torch.Tensor:
        """W, [hidden, num_heads * head_dim]: a view, whichever way the module keeps it."""
        weight: torch.Tensor = self.module.weight.detach()
        return weight if isinstance(self.module, (nn.Linear, Bare)) else weight.t()

    def head_columns(self, heads: Sequence[int]) -> HeadColumns:
        """The columns of W that these heads' outputs meet."""
        return HeadColumns.in_projection(self.weight, heads, self.head_dim)

    @property
    def dtype_name(self) -> str:
        """The weight's dtype, as a receipt names it: "bfloat16"."""
        return str(self.module.weight.dtype).removeprefix("torch.")

    @property
    def bias(self) -> torch.Tensor | None:
        """c, [hidden], or None."""
        bias: torch.Tensor | None = self.module.bias
        return bias


# The mark of a module whose place a `LockedLinear` has taken.
REPLACED = "_fastlock_replaced"

# By exact type: quantised and adapted layers inherit from nn.Linear and compute something else.
_PROJECTIONS = (
    "fastlock.models.sites.Bare",
    "torch.nn.modules.linear.Linear",
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of `torch.compile`'s wrapper.

    Raises:
        FastlockError: it is no transformers model, only the inner part of one, or it carries adapters.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module) or not hasattr(getattr(inner, "config", None), "get_text_config"):
        raise FastlockError(
            f"{type(model).__name__} is not a transformers model (a PreTrainedModel with a config). "
            "If it is wrapped (DataParallel, FSDP, DDP), pass the model inside."
        )
    if hasattr(inner, "get_base_model") or getattr(inner, "_hf_peft_config_loaded", False):
        raise FastlockError(
            f"{type(inner).__name__} carries PEFT adapters, and saving it would save the adapters without the lock. "
            "Merge them first (merge_and_unload), then relock."
        )
    if getattr(inner, "base_model", None) is inner:
        raise FastlockError(
            f"{type(inner).__name__} is the inner part of a language model, and the model around it would be saved "
            "without the lock. Pass the whole model (AutoModelForCausalLM loads it)."
        )
    return inner


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        FastlockError: the fold would not be exact in it, or nobody has checked that it is.
    """
    return family_of_config(text_config(model), type(model).__name__)


def text_config(model: nn.Module) -> Any:
    """The config of the decoder: the model's own, or the text part of a multi-modal one."""
    config: Any = model.config
    return config.get_text_config()


def sites(model: nn.Module) -> list[Site]:
    """Every layer's attention output projection, in order.

    Raises:
        FastlockError: the family is refused or unknown, or the model does not look like its family.
    """
    model = unwrapped(model)
    family, config = family_of(model), text_config(model)
    num_heads, head_dim = head_geometry(config)
    path, layers = _layers(model, family, config)
    return [
        Site(index, f"{path}.{index}.{family.projection}", layer.get_submodule(family.projection), num_heads, head_dim)
        for index, layer in enumerate(layers)
    ]


def _layers(model: nn.Module, family: Family, config: Any) -> tuple[str, nn.ModuleList]:
    found = [
        (path, layers)
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        and path.rpartition(".")[2] == family.layers
        and len(layers) == config.num_hidden_layers
        and all(_has_submodule(layer, family.projection) for layer in layers)
    ]
    if len(found) != 1:
        raise FastlockError(
            f"{type(model).__name__}: found {len(found)} lists of {config.num_hidden_layers} layers with "
            f"{family.projection}, where its family ({config.model_type}) has one. It was altered, or is a variant "
            "that fastlock does not know."
        )
    foreign = [type(layer).__module__ for layer in found[0][1] if not _from_transformers(layer)]
    if foreign:
        raise FastlockError(
            f"{type(model).__name__}: its layers come from {foreign[0]}, not from transformers; nobody has checked "
            "that their output projection takes plain concatenated head outputs. Load it without remote code."
        )
    return found[0]


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
        FastlockError: the lock is of another geometry, or a weight can't be folded (quantised, on the meta
            device, sharded, shared between layers).
    """
    all_sites = sites(model)
    inner = unwrapped(model)
    check_lock_fits(lock, len(all_sites), text_config(inner), type(inner).__name__)
    wanted = set(lock.layers.tolist())
    locked = [site for site in all_sites if site.layer in wanted]
    owners: dict[int, Site] = {}
    for site in all_sites:
        first = owners.setdefault(id(site.module), site)
        if first is not site and {first.layer, site.layer} & wanted:
            raise FastlockError(
                f"{site.name} and {first.name} are one module: a bias for one layer would act in the other too. "
                "A model whose layers share their output projection can't be relocked."
            )
    for site in locked:
        check_foldable(site)
    return locked


def bare_sites(projections: Projections, lock: Lock, name: str) -> list[Site]:
    """The sites that the lock shifts, out of a model's output projections alone, layers ascending; each checked.

    That they take plain concatenated head outputs can't be seen from them: who gives them must know.

    Args:
        projections: of every locked layer at least.
        name: whose they are, for messages.

    Raises:
        FastlockError: a locked layer lacks, the lock is of another geometry, or a tensor can't be folded.
    """
    found = []
    for layer in sorted(set(lock.layers.tolist())):
        given = projections.get(layer)
        weight, bias = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor | None):
            raise FastlockError(
                f"{name}[{layer}] is {type(given).__name__}, but the lock shifts this layer. Give the weight of its "
                "output projection, a tensor [hidden, num_heads * head_dim], or a pair of weight and bias."
            )
        columns = weight.shape[-1] if weight.dim() else 0
        if columns % lock.directions.shape[1]:
            raise FastlockError(
                f"{name}[{layer}]: its weight is {list(weight.shape)}, and {columns} columns are no heads of "
                f"{lock.directions.shape[1]}, as the lock's are. Use the lock of this model's own aligned base."
            )
        head_dim = lock.directions.shape[1]
        site = Site(layer, f"{name}[{layer}]", Bare(weight, bias), columns // head_dim, head_dim)
        check_foldable(site)
        _check_bare_fits(site, lock)
        found.append(site)
    return found


def _check_bare_fits(site: Site, lock: Lock) -> None:
    there = {"num_heads": site.num_heads, "hidden_size": site.weight.shape[0]}
    for key, value in there.items():
        if getattr(lock, key) not in (None, value):
            raise FastlockError(
                f"{site.name}: its {key} is {value}, but {getattr(lock, key)} in the base of the lock. Use the lock of "
                "this model's own aligned base."
            )
    beyond = [head for head in lock.heads[lock.layers == site.layer].tolist() if head >= site.num_heads]
    if beyond:
        raise FastlockError(f"{site.name}: head {beyond[0]} is locked, but it has {site.num_heads} heads.")


def check_foldable(site: Site) -> None:
    """The projection is a plain floating-point matrix that is really there, of the shape its config says."""
    kind = type(site.module)
    if f"{kind.__module__}.{kind.__qualname__}" == "fastlock.models.request_locks.LockedLinear":
        raise FastlockError(f"{site.name} has locks per request. Take them out first: RequestLocks.remove().")
    if f"{kind.__module__}.{kind.__qualname__}" not in _PROJECTIONS:
        raise FastlockError(
            f"{site.name} is a {kind.__module__}.{kind.__name__}, not a plain linear layer. Quantised models and "
            "adapters can't be relocked yet: load the checkpoint unquantised, or merge its adapters first."
        )
    if site.module.__dict__.get(REPLACED):
        raise FastlockError(
            f"{site.name} is part of another model too, which has locks per request. Take them out first: "
            "RequestLocks.remove()."
        )
    if isinstance(site.module, nn.Module) and "weight" not in site.module._parameters:
        raise FastlockError(
            f"{site.name}.weight is no parameter, but computed before each forward pass (pruned or normed, say). Make "
            "it one first, as by torch.nn.utils.prune.remove(module, 'weight')."
        )
    parameter = site.module.weight
    hook = getattr(site.module, "_hf_hook", None)
    if parameter.device.type == "meta" or getattr(hook, "offload", False):
        raise FastlockError(
            f"{site.name} has no weights in memory (meta device: offloaded to CPU or disk, or not loaded). "
            "Load the model with its locked layers on a device: a smaller device_map, or more memory."
        )
    if type(parameter) not in (torch.Tensor, nn.Parameter) or parameter.is_sparse:
        raise FastlockError(
            f"{site.name}.weight is a {type(parameter).__name__}, not a plain tensor (sharded or quantised). "
            "Gather it, or load the checkpoint unquantised, then relock."
        )
    if site.weight.dtype not in DTYPES.values():
        raise FastlockError(
            f"{site.name}.weight has dtype {site.weight.dtype}; fastlock folds float16, bfloat16, float32 and float64. "
            "Quantised models can't be relocked yet: load the checkpoint unquantised."
        )
    if parameter.untyped_storage().nbytes() < _extent(parameter):
        raise FastlockError(
            f"{site.name}.weight has no memory behind it: its storage was resized (freed, as sharding libraries do). "
            "Gather the weights, then relock."
        )
    width = site.num_heads * site.head_dim
    if site.weight.dim() != 2 or site.weight.shape[1] != width:
        raise FastlockError(
            f"{site.name}.weight is {list(site.weight.shape)}, but its config says {site.num_heads} heads of "
            f"{site.head_dim}: {width} columns. The config and the weights do not belong together."
        )
    if site.bias is not None and site.bias.shape != site.weight.shape[:1]:
        raise FastlockError(
            f"{site.name}: bias is {list(site.bias.shape)}, but the weight has {site.weight.shape[0]} rows. They do "
            "not belong together."
        )
    if site.bias is not None and (site.bias.dtype, site.bias.device) != (site.weight.dtype, site.weight.device):
        raise FastlockError(
            f"{site.name}: bias is {site.bias.dtype} on {site.bias.device}, weight {site.weight.dtype} on "
            f"{site.weight.device}. Bring the model to one dtype and the layer to one device first."
        )


def _extent(tensor: torch.Tensor) -> int:
    """How many bytes of its storage a tensor reaches into."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + last + 1) * tensor.element_size())
