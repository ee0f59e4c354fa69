"""Methods whose layer PEFT itself evaluates: f = layer(d) - layer(0), with the whole of W in float64.

A model that holds nothing but the one projection is given to PEFT with the adapter's own config and tensors. What
comes out is checked before it is believed: that the layer is affine, so that f is the same at every position; and what
it does with a bias of its base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlock.checkpoints.adapters.methods.method import Action, AdaptedSite, Effect, check_only_peft, damaged
from fastlock.checkpoints.adapters.methods.patterns import value_for
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import FastlockError, UnsupportedError, shown
from fastlock.models.projections.adapted import alike

# What of a config says which modules are adapted: here it is the one, whatever it says.
_CHOICE = {
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "bias": "none",
    "task_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "target_modules_to_tie": None,
    "trainable_token_indices": None,
}
# Methods whose modules share matrices that are as large as the largest of them asks for; and one of that size.
_MEASURED = ("PVERA", "RANDLORA", "VERA")
_LARGEST = "fastlock_largest"
# Those matrices are made even of nothing, by the seed: this bounds them.
_MAX_SHARED_NUMBERS = 2**28
# What PEFT makes of other methods' tensors beside them, out of what their config says, is bounded by this and W's size.
_MAX_MADE_NUMBERS = 2**26
# What PEFT cannot build on the meta device: these ask for a few times the memory that W and shared matrices take.
_NOT_WITHOUT_NUMBERS = (*_MEASURED, "BOFT", "SHIRA")
# Where SHiRA's numbers belong in W, [2, n]: rows and columns, which PEFT reads memory by without looking at them.
_PLACES = "shira_indices"
_PATTERNS = ("rank_pattern", "alpha_pattern")
_MAX_NUMBER = 2**31
# What PEFT loops over as often as a config says, and no tensor's shape holds.
_MAX_LOOPS = {"num_cayley_neumann_terms": 1024, "boft_n_butterfly_factor": 64, "depth": 256}


def by_peft(at: AdaptedSite) -> Effect:
    """As of `Method`; nothing but PEFT's own scale is known.

    Raises:
        FastlockError: PEFT is not installed.
        UnsupportedError: the layer is not affine, or PEFT is too old, or too new, to read it.
        DamagedError: the adapter's tensors do not fit its config.
    """
    check_only_peft(at)
    _check_known(at)
    tensors = {
        name: at.adapter.read(tensor, whole_numbers=True)
        for name, tensor in (_shared(at) | dict(at.parameters)).items()
    }
    _check_numbers_of(at, tensors)
    layer = _guarded(at, lambda: _layer(at, tensors, at.whole_weight()))
    shift, action = _guarded(at, lambda: _evaluate(layer, at))
    return Effect(shift, action, None, None, tuple(tensors[name] for name in sorted(tensors)))


def _check_known(at: AdaptedSite) -> None:
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise FastlockError(
            f"{at.where}: is of the method {at.adapter.method}, whose layer PEFT has to evaluate, and PEFT is not "
            "installed. Run: pip install 'fastlock[adapters]'"
        ) from None
    if at.adapter.method not in {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}:
        raise UnsupportedError(
            f"{at.where}: is of the method {at.adapter.method}, which the installed release of PEFT does not know. "
            "Install one that does, or save the adapter anew with one that reads it."
        )


def _shared(at: AdaptedSite) -> dict[str, StoredTensor]:
    """The tensors that the adapter keeps once for all modules, by their whole keys."""
    return {f"base_model.{name}": tensor for name, tensor in at.adapter.modules.get("", {}).items()}


def _guarded(at: AdaptedSite, call: Callable[[], Any]) -> Any:
    """The result of what PEFT computes of a stranger's numbers: it raises whatever its parts raise."""
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=()),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            return call()
    except FastlockError:
        raise
    except Exception as error:
        raise damaged(
            at,
            f"PEFT cannot build the layer ({type(error).__name__}: {shown(str(error))[:300]}). Its tensors and its "
            "config do not belong together, or another release of PEFT wrote them",
        ) from None


def _layer(at: AdaptedSite, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> nn.Module:
    """The adapted projection, as PEFT builds and loads it, over W and a bias of zeros; float64."""
    config = _config(at)
    stored = {
        name if name.startswith("base_model.") else f"base_model.model.{at.path}.{name}": tensor
        for name, tensor in tensors.items()
    }
    # Of nothing first: what a hostile config makes PEFT ask memory for is seen before it is asked for.
    if at.adapter.method not in _NOT_WITHOUT_NUMBERS:
        with torch.device("meta"):
            of_nothing = _adapted(config, at, None, low_cpu_mem_usage=True)
        _check_fits(at, of_nothing, stored)
        _check_size(at, of_nothing, stored)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=True, device="meta", dtype=torch.float64)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=torch.float64, device="cpu"), requires_grad=False)
    model = _adapted(config, at, linear, low_cpu_mem_usage=False)
    _check_fits(at, model, stored)
    _load(at, model, stored)
    layer: nn.Module = model.eval().get_submodule(f"base_model.model.{at.path}")
    return layer.double()


def _config(at: AdaptedSite) -> Any:
    """The adapter's config as PEFT reads it, for the one projection."""
    from peft import PeftConfig  # optional

    keys = {key: value for key, value in at.adapter.config.items() if key != "peft_type"}
    _check_numbers(at, keys)
    for name, most in _MAX_LOOPS.items():
        if isinstance(count := keys.get(name), int) and count > most:
            raise damaged(at, f"its config gives {count} for {name}, and fastlock goes up to {most}")
    for name in _PATTERNS:
        if keys.get(name):
            value = value_for(keys[name], at.path, None, name, at.adapter.where)
            keys[name] = {} if value is None else {re.escape(at.path): value}
    keys |= {key: value for key, value in _CHOICE.items() if key in keys}
    if at.site.transposed:
        keys |= {"fan_in_fan_out": False}  # W is given as a plain linear layer has it
    targets = [at.path, _LARGEST] if at.adapter.method in _MEASURED else [at.path]
    configs: Any = PeftConfig
    return configs.from_peft_type(peft_type=at.adapter.method, **keys | {"target_modules": targets})


def _check_numbers(at: AdaptedSite, value: Any) -> None:
    """Refuse numbers that no config has, as loops and seeds may be as long as they say."""
    if isinstance(value, dict):
        for held in value.values():
            _check_numbers(at, held)
    elif isinstance(value, list):
        for held in value:
            _check_numbers(at, held)
    elif type(value) in (int, float) and not abs(value) < _MAX_NUMBER:
        raise damaged(at, f"its config says {str(value)[:40]}, and no adapter has such a number")


def _adapted(config: Any, at: AdaptedSite, linear: nn.Module | None, low_cpu_mem_usage: bool) -> nn.Module:
    """A model of the one projection, and of what PEFT measures the others by, with an adapter that is not loaded."""
    from peft import get_peft_model  # optional

    if linear is None:
        linear = nn.Linear(at.width, at.site.hidden_size, device="meta", dtype=torch.float64)
    root = nn.Module()
    parent = root
    *above, last = at.path.split(".")
    for name in above:
        child = nn.Module()
        parent.add_module(name, child)
        parent = child
    parent.add_module(last, linear)
    if at.adapter.method in _MEASURED:
        largest = _largest(at, config.r)
        # Its memory is never written to, and takes none.
        root.add_module(_LARGEST, nn.Linear(*largest, bias=False, device="meta").to_empty(device="cpu"))
    model: nn.Module = get_peft_model(root, config, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage)
    return model


def _largest(at: AdaptedSite, rank: Any) -> tuple[int, int]:
    """The longest input and the longest output of the modules that share matrices of this rank."""
    hidden, width = at.largest()
    largest = max(width, at.width), max(hidden, at.site.hidden_size)
    known = type(rank) is int and any({rank, 2 * rank} & set(tensor.shape) for tensor in at.parameters.values())
    if not known or rank * max(largest) > _MAX_SHARED_NUMBERS:
        raise damaged(at, f"its config gives the rank {str(rank)[:40]!a}, which its tensors do not have")
    return largest


def _check_fits(at: AdaptedSite, model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    """Refuse a config that makes PEFT ask for tensors of other shapes than are stored."""
    from peft import get_peft_model_state_dict  # optional

    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if f".{_LARGEST}." in name:
            continue
        if name not in stored:
            raise damaged(at, f"lacks {shown(name.rpartition(at.path)[2] or name)[:100]}")
        if stored[name].shape != tensor.shape:
            raise damaged(
                at,
                f"{shown(name.rpartition(at.path)[2] or name)[:100]} is {list(stored[name].shape)}, and by its config "
                f"it is {list(tensor.shape)}. They do not belong together",
            )


def _check_size(at: AdaptedSite, model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    """Refuse a config that makes PEFT ask for far more numbers than are stored."""
    made = sum(parameter.numel() for parameter in model.parameters()) - sum(map(torch.numel, stored.values()))
    if made > _MAX_MADE_NUMBERS + at.width * at.site.hidden_size:
        raise damaged(at, f"its config asks for {made} numbers more than its tensors hold")


def _load(at: AdaptedSite, model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict  # optional

    result: Any = set_peft_model_state_dict(model, dict(stored))
    if result.unexpected_keys:
        name = str(result.unexpected_keys[0]).rpartition(at.path)[2]
        raise UnsupportedError(
            f"{at.where}: holds {shown(name)[:100]}, which this release of PEFT does not load. Use the release that "
            "wrote it, or load and save the adapter with this one."
        )


def _check_numbers_of(at: AdaptedSite, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.double().isfinite().all():
            raise damaged(at, f"{shown(name)[:100]} holds NaN or infinite numbers")
    places = tensors.get(_PLACES)
    if places is None:
        return
    sizes = torch.tensor([[at.site.hidden_size], [at.width]], device="cpu")
    if places.shape[:1] != (2,) or places.dim() != 2 or not ((places >= 0) & (places < sizes)).all():
        raise damaged(at, f"{_PLACES} names numbers that its projection does not have")


def _evaluate(layer: Any, at: AdaptedSite) -> tuple[torch.Tensor, Action]:
    """f, and what the layer does with a bias of its base."""
    d = at.displacement.dense(at.width)
    generator = torch.Generator("cpu").manual_seed(0)
    elsewhere = torch.randn(at.width, generator=generator, dtype=torch.float64, device="cpu")
    zero, displaced, there, there_displaced = layer(torch.stack([0 * d, d, elsewhere, elsewhere + d])[None])[0]
    shift = displaced - zero
    scale = max(float(x.abs().max()) for x in (displaced, there, there_displaced, at.base_part))
    if not alike(there_displaced - there, shift, scale):
        raise UnsupportedError(
            f"{at.where}: its layer is not affine: what a displacement does to it depends on its input, and no bias "
            "does the same. Merge the adapter into its base if PEFT can, and relock the result."
        )
    layer.get_base_layer().bias.copy_(at.base_part)
    through = layer((0 * d)[None, None])[0, 0] - zero
    if alike(through, at.base_part, scale):
        return shift, "added"
    if alike(through, shift, scale):
        return shift, "scaled"
    return shift, "replaced"
