"""A LoRA merged into its base's files: W + s B A in float64, rounded once to the base's dtype; nothing is loaded.

Each touched tensor is computed by itself, in its place in the file, so that memory holds one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlock.checkpoints.adapters.adapter import Adapter, plain_path
from fastlock.checkpoints.adapters.adapter_files import data_of
from fastlock.checkpoints.adapters.methods.lora_kinds import NOT_PLAIN
from fastlock.checkpoints.adapters.methods.lora_scales import alpha_in, peft_scale, rank_in
from fastlock.checkpoints.adapters.methods.method import MAX_NUMBER
from fastlock.checkpoints.adapters.unlocking import put
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.layout import is_private
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import DamagedError, FastlockError, MismatchError, shown
from fastlock.kernels.fold.reference import rounded
from fastlock.storage.new_directory import create_local_directory
from fastlock.storage.places import Place

_A, _B, _WEIGHT, _BIAS = "lora_A.weight", "lora_B.weight", "weight", "bias"
_LARGEST_NUMBER = 8  # bytes
_MERGED = ({_A, _B}, {_WEIGHT}, {_WEIGHT, _BIAS})
# The keys of a config with which PEFT computes something else than W + s B A.
_OTHERWISE = (*NOT_PLAIN, "kasa_config")


@dataclass(frozen=True, eq=False)
class _Merge:
    """What a tensor of the base becomes: W + s B A, or what the adapter has in its place.

    Attributes:
        scale, a, b: s, A and B; None and no tensors where it is replaced.
        own: what it is replaced by.
        transposed: whether the file holds Wᵀ.
    """

    scale: float | None
    a: StoredTensor | None
    b: StoredTensor | None
    own: StoredTensor | None
    transposed: bool


def why_not_merged(adapter: Adapter, base: Checkpoint) -> str | None:
    """Why an adapter cannot be merged exactly into its base's files, as a clause; None if it can."""
    if adapter.method != "LORA":
        return f"fastlock merges LoRAs alone, and this is of the method {shown(adapter.method)[:40]}"
    if (key := next((key for key in _OTHERWISE if adapter.config.get(key)), None)) is not None:
        return f"fastlock does not merge LoRAs with {key}"
    if base.quantisation or any(site.quantised for site in base.sites):
        return "the base is quantised, and merging would round it anew"
    for path, parameters in adapter.modules.items():
        if set(parameters) not in _MERGED:
            odd = sorted(set(parameters) - {_A, _B, _WEIGHT, _BIAS}) or sorted(parameters)
            return f"{shown(path)[:120]} has {shown(odd[0])[:60]}, which the base has no place for"
    try:
        _merges(adapter, base)
    except FastlockError as error:
        return str(error)
    return None


def write_merged(adapter: Adapter, base: Checkpoint, place: Place, out: Path) -> None:
    """Write a base with an adapter merged into it to a new directory.

    Args:
        adapter: of `why_not_merged` None.
        base: the checkpoint, at `place`.
        place: its directory or URL.
        out: the directory to make.

    Raises:
        DamagedError: a merged weight is not finite, or a file was changed meanwhile.
        FastlockError: `out` cannot be written.
    """
    merges = _merges(adapter, base)
    touched = {base.shards.tensors[name].file for name in merges}
    with create_local_directory(out, place, in_place=False) as new:
        for name, file in base.files.items():
            if name in touched:
                new.write_parts(name, _merged_parts(adapter, base, name, merges))
            elif not is_private(name):
                put(new, name, file, copy=name not in base.shards.files)
        base.check_unchanged()
        adapter.check_unchanged()


def _merges(adapter: Adapter, base: Checkpoint) -> dict[str, _Merge]:
    """What becomes of each tensor of the base that the adapter touches, by its name in the files."""
    names = {plain_path(name): name for name in base.shards.tensors}
    merges: dict[str, _Merge] = {}
    for path, parameters in adapter.modules.items():
        for own in (_WEIGHT, _BIAS):
            if own in parameters:
                name = _named(names, f"{plain_path(path)}.{own}", adapter, path, base)
                merges[name] = _Merge(None, None, None, parameters[own], False)
                _check_shape(adapter, path, base.shards.tensors[name], parameters[own].shape)
        if _A in parameters:
            name = _named(names, f"{plain_path(path)}.{_WEIGHT}", adapter, path, base)
            merges[name] = _of_lora(adapter, path, parameters, base.shards.tensors[name])
    return merges


def _of_lora(adapter: Adapter, path: str, parameters: Mapping[str, StoredTensor], stored: StoredTensor) -> _Merge:
    a, b, config = parameters[_A], parameters[_B], adapter.config
    rank, alpha = rank_in(config, path, adapter.where), alpha_in(config, path, adapter.where)
    sound = type(rank) is int and len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank > 0
    if not sound or type(alpha) not in (int, float) or not abs(alpha) < MAX_NUMBER:
        raise DamagedError(f"{adapter.where}: {shown(path)[:200]} has an A and a B that do not go together.")
    transposed = bool(config.get("fan_in_fan_out"))
    shape = (b.shape[0], a.shape[1])
    _check_shape(adapter, path, stored, shape[::-1] if transposed else shape)
    return _Merge(peft_scale(config, alpha, rank), a, b, None, transposed)


def _named(names: dict[str, str], name: str, adapter: Adapter, path: str, base: Checkpoint) -> str:
    if name not in names:
        raise MismatchError(
            f"{adapter.where}: it adapts {shown(path)[:200]}, and {base.where} stores no such tensor. Give the base "
            "that the adapter was trained on."
        )
    return names[name]


def _check_shape(adapter: Adapter, path: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != tuple(shape) or stored.torch_dtype is None:
        raise MismatchError(
            f"{adapter.where}: {shown(path)[:200]} is for a tensor of {list(shape)}, and the base's is "
            f"{list(stored.shape)}, {stored.dtype[:20]!a}. Give the base that the adapter was trained on."
        )


def _merged_parts(adapter: Adapter, base: Checkpoint, shard: str, merges: Mapping[str, _Merge]) -> Iterator[bytes]:
    """A shard of the base with its touched tensors merged, piece by piece."""
    file, at = base.files[shard], 0
    in_shard = [(base.shards.tensors[name], name) for name in merges if base.shards.tensors[name].file == shard]
    for stored, name in sorted(in_shard, key=lambda pair: pair[0].start):
        yield from data_of(file, at, stored.start)
        yield _merged(adapter, base, stored, name, merges[name])
        at = stored.start + stored.length
    yield from data_of(file, at, file.size)


def _merged(adapter: Adapter, base: Checkpoint, stored: StoredTensor, name: str, merge: _Merge) -> bytes:
    dtype = stored.torch_dtype
    if dtype is None:
        raise DamagedError(
            f"{base.where}: {shown(name)[:200]} is {stored.dtype[:20]!a}, and nothing is merged into that."
        )
    if merge.own is not None:
        result = adapter.read(merge.own, most=_LARGEST_NUMBER * math.prod(stored.shape)).double()
    else:
        data = bytearray(base.files[stored.file].read(stored.start, stored.length))
        result = torch.frombuffer(data, dtype=dtype).view(stored.shape).double()
    if merge.scale is not None and merge.a is not None and merge.b is not None:
        delta = adapter.read(merge.b).double() @ adapter.read(merge.a).double()
        result += merge.scale * (delta.t() if merge.transposed else delta)
    result = rounded(result, dtype)
    if not result.isfinite().all():
        raise DamagedError(
            f"{adapter.where}: {shown(name)[:200]} is not finite once it is merged. Nothing was written."
        )
    return result.contiguous().view(torch.uint8).numpy().tobytes()
