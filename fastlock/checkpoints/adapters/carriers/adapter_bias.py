"""Adapter bias: the lock is in the LoRA itself, as the bias that `lora_bias` gives B: y = W x + c + s (B A x + β).

β gains f / s at each locked layer. PEFT then wants a bias in every module that the adapter targets: zeros elsewhere.
Where the adapter leaves a locked projection alone, it gains one of rank 1 there that adds nothing but its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastlock.architectures.adapter_stacks import ADAPTER_STACKS, PLAIN_STARTS
from fastlock.checkpoints.adapters.adapter import ADAPTER_WEIGHTS
from fastlock.checkpoints.adapters.adapter_files import with_tensors
from fastlock.checkpoints.adapters.carriers.carrier import (
    AdapterCarrier,
    AdapterJob,
    Carried,
    objections_to_relocked,
    rounded_bias,
)
from fastlock.checkpoints.adapters.folding import AdapterFold
from fastlock.checkpoints.adapters.methods.lora_kinds import NOT_PLAIN
from fastlock.checkpoints.adapters.module_paths import layers_path, new_path
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import UnsupportedError, shown

_A, _B, LORA_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_PREFIX = "base_model.model."
_PATTERNS = ("rank_pattern", "alpha_pattern")
# The keys of a config with which PEFT computes something else than B A x, or loads no bias.
_OTHERWISE = (*NOT_PLAIN, "velora_config")


def _objections(job: AdapterJob, stack: str) -> Iterator[str]:
    adapter = job.adapter
    if not ADAPTER_STACKS[stack].adapter_bias:
        yield f"{stack} loads no biases of an adapter"
    yield from objections_to_relocked(job)
    if adapter.method != "LORA":
        yield f"PEFT has no such bias in the method {shown(adapter.method)[:40]}"
    if (key := next((key for key in _OTHERWISE if adapter.config.get(key)), None)) is not None:
        yield f"PEFT has no such bias with {key}"
    start = adapter.config.get("init_lora_weights", True)
    if not isinstance(start, bool) and (not isinstance(start, str) or start.lower() not in PLAIN_STARTS):
        yield f"PEFT has no such bias with init_lora_weights = {str(start)[:40]!a}"
    if any(name.startswith("lora_embedding_") for parameters in adapter.modules.values() for name in parameters):
        yield "PEFT has no such bias where an adapter touches embeddings"
    if any(adapter.config.get(key) and not isinstance(adapter.config[key], dict) for key in _PATTERNS):
        yield f"its {' or '.join(_PATTERNS)} is not an object"
    folds = job.folds()
    if any(fold.touched and _B not in fold.parameters for fold in folds):
        yield "the adapter has output projections, or biases, of its own in place of the base's"
    if (zero := next((fold.layer for fold in folds if fold.scale == 0), None)) is not None:
        yield f"it scales layer {zero} by 0"
    if any(not fold.touched for fold in folds) and layers_path(adapter, job.base.part.checkpoint) is None:
        yield "the adapter touches no layer by which the others' names can be told"


def _carry(job: AdapterJob, stacks: tuple[str, ...]) -> Carried:
    adapter = job.adapter
    keys = {id(tensor): key for key, tensor in adapter.tensors.items()}
    changed: dict[int, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    carried = Carried([], [], job.base.place, stacks[0])
    new_paths = []
    for fold in job.folds(stacks[0]):
        path = fold.path or new_path(adapter, job.base.part.checkpoint, fold.site)
        carried.names.append(path)
        if not fold.touched:
            new_paths.append(path)
            bias = _add_projection(fold, path, added, _dtype(job), adapter.where)
        else:
            bias = _give_bias(job, fold, keys, changed, added, carried)
        carried.biases.append(bias)
    for key, tensor in adapter.tensors.items():
        if key.endswith(_B) and (bias_key := key.removesuffix("weight") + "bias") not in adapter.tensors:
            added.setdefault(bias_key, torch.zeros(tensor.shape[0], dtype=_torch_dtype(tensor, key, adapter.where)))
    weights = with_tensors(adapter.files[ADAPTER_WEIGHTS], changed, added)
    return Carried(
        carried.biases,
        carried.names,
        job.base.place,
        stacks[0],
        _config(adapter.config, [path for path, p in adapter.modules.items() if _B in p], new_paths),
        weights,
        original_biases=carried.original_biases,
    )


def _give_bias(
    job: AdapterJob,
    fold: AdapterFold,
    keys: dict[int, str],
    changed: dict[int, torch.Tensor],
    added: dict[str, torch.Tensor],
    carried: Carried,
) -> torch.Tensor:
    """β + f / s of a projection that the adapter touches, put among the tensors that change or are new."""
    stored, scale = fold.parameters[_B], fold.scale
    if scale is None:
        raise UnsupportedError(f"{job.adapter.where}: layer {fold.layer} has no scale, so no bias can be scaled by it.")
    bias, key = fold.bias / scale, keys[id(stored)]
    before = fold.parameters.get(LORA_BIAS)
    if before is not None:
        carried.original_biases[fold.layer] = job.adapter.read(before)
        bias = bias + carried.original_biases[fold.layer].double()
        dtype = carried.original_biases[fold.layer].dtype
    else:
        dtype = _torch_dtype(stored, key, job.adapter.where)
    result = rounded_bias(bias, dtype, fold, job.adapter.where)
    if before is not None:
        changed[before.start] = result
    else:
        added[key.removesuffix("weight") + "bias"] = result
    return result


def _add_projection(
    fold: AdapterFold, path: str, added: dict[str, torch.Tensor], dtype: torch.dtype, where: str
) -> torch.Tensor:
    """A projection of rank 1 and s = 1 that adds its bias alone, put among the tensors that are new; the bias."""
    width = fold.site.num_heads * fold.site.head_dim
    bias = rounded_bias(fold.bias, dtype, fold, where)
    added[f"{_PREFIX}{path}.{_A}"] = torch.zeros(1, width, dtype=dtype)
    added[f"{_PREFIX}{path}.{_B}"] = torch.zeros(fold.site.hidden_size, 1, dtype=dtype)
    added[f"{_PREFIX}{path}.{LORA_BIAS}"] = bias
    return bias


def _config(config: dict[str, Any], targets: list[str], new_paths: list[str]) -> dict[str, Any]:
    """The new adapter_config.json: with biases, and with projections added at new paths."""
    changed = config | {"lora_bias": True}
    if not isinstance(config.get("init_lora_weights", True), bool):
        changed["init_lora_weights"] = True  # PEFT wants it with biases, and replaces what it sets by what it loads
    if new_paths:  # every module by its whole path, which PEFT takes whatever patterns and lists of layers say
        changed["target_modules"] = [*targets, *new_paths]
        if "exclude_modules" in config:
            changed["exclude_modules"] = None
        ones = dict.fromkeys(new_paths, 1)
        for key in _PATTERNS:
            changed[key] = ones | (config.get(key) or {})
    return changed


def _dtype(job: AdapterJob) -> torch.dtype:
    """The dtype of what the adapter gains where it has nothing yet: that of the rest."""
    where = job.adapter.where
    return next(_torch_dtype(tensor, key, where) for key, tensor in job.adapter.tensors.items() if key.endswith(_B))


def _torch_dtype(tensor: StoredTensor, key: str, where: str) -> torch.dtype:
    if tensor.torch_dtype is None:
        raise UnsupportedError(
            f"{where}: {shown(key)[:200]} is {tensor.dtype[:20]!a}, and a bias beside it cannot be. Save the adapter "
            "in float16, bfloat16 or float32."
        )
    return tensor.torch_dtype


ADAPTER_BIAS = AdapterCarrier(
    "adapter bias", _objections, _carry, "Load it with PEFT or transformers, over {base} as it is: it brings its lock."
)
