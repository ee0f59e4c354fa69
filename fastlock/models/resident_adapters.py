"""The fold of many adapters that are in memory over one base: W d once, and one launch for all the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from fastlock.architectures.families import check_lock_fits
from fastlock.dtypes import FOLDABLE, torch_name
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError, shown
from fastlock.fold import check_not_capturing, rounded_fold, too_strong
from fastlock.kernels.adapter_fold import launch as kernel
from fastlock.kernels.adapter_fold.reference import LowRankSite, exact_adapter_fold, fold_adapter_sites
from fastlock.kernels.adapter_fold.variants import DTYPES, MAX_RANK, AdapterVariant
from fastlock.kernels.ahead_of_time.ways import NoWayError
from fastlock.kernels.fold.reference import HeadColumns, exact_fold
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for
from fastlock.models.base_check import check_basis
from fastlock.models.sites import (
    BareProjections,
    Site,
    bare_sites,
    check_foldable,
    is_peft_model,
    sites,
    sites_for,
    text_config,
)

# At one layer A, [rank, num_heads * head_dim], B, [hidden, rank], and s: y = W x + c + s B A x.
LowRank: TypeAlias = "tuple[torch.Tensor, torch.Tensor, float]"
# One adapter: what it has at each layer where it adapts the output projection; or its name in the base, a PeftModel.
ResidentAdapter: TypeAlias = "Mapping[int, LowRank] | str"

# PEFT's layers that compute W x + c + s B A x, by name: importing peft takes seconds.
_PLAIN_LORA = ("peft.tuners.lora.layer.Linear",)


def fold_adapters(
    base: nn.Module | BareProjections,
    adapters: Sequence[ResidentAdapter],
    lock: Lock,
    strength: float | None = None,
) -> dict[int, torch.Tensor]:
    """What a lock adds to each locked layer's output under each of many LoRAs of one base, f = W d + s·B(A d).

    It is layer(d) - layer(0), without the biases that base and adapters already have: rows for a table that a server
    adds by adapter, or for adapters' own biases. W d is read once, and of A the locked heads' columns only. On a CUDA
    device all adapters of one dtype take one launch (two, where some cannot be read 16 bytes at a time), which
    accumulates in float32; elsewhere the reference folds in float64. Each number is rounded once.

    Args:
        base: a transformers model or a PeftModel, its projections plain; or its output projections alone, as
            `fastlock.Plan` takes them. It is only read.
        adapters: of each, {layer: (A, B, s)} for the layers whose output projection it adapts, A [rank, num_heads *
            head_dim] and B [hidden, rank] of one dtype and on the layer's device; or its name in the PeftModel, with a
            LoRA at every such layer. They need not be active, and one may be there twice.
        lock: the lock of the aligned base.
        strength: the paper's α, 0 or more; by default as for `fastlock.relock`.

    Returns:
        By locked layer, [len(adapters), hidden], of the base's dtype and device, in the order of the adapters.

    Raises:
        MismatchError: the lock, or an adapter's shape, does not fit the base.
        UnsupportedError: an adapter is no plain LoRA there, or weights are not in a form that can be folded.
        DamagedError: weights or adapters hold NaN or infinities.
        FastlockError: an argument is wrong, or the strength is too large for the dtype.
    """
    check_lock(lock)
    strength = strength_for(lock, strength)
    check_not_capturing()
    _check_list(base, adapters)
    displacements = lock.displacement(strength)
    with torch.inference_mode(False), torch.no_grad():
        located = _located(base, lock)
        check_basis([site for site, _ in located], displacements, lock, located[0][0].name)
        results = {}
        folds: list[_RowFold] = []
        for site, module in located:
            layer = _Layer(site, displacements[site.layer])
            results[site.layer] = layer.rows(len(adapters))
            for number, adapter in enumerate(adapters):
                low_rank = _low_rank(adapter, number, site, module)
                if low_rank is not None:
                    name = _named(adapter, number, site)
                    folds.append(_RowFold(layer.adapted(low_rank, name), results[site.layer][number], name))
        _fold(folds)
    return results


@dataclass(frozen=True, eq=False)
class _RowFold:
    """One adapter at one layer, where its fold goes, and its name for messages."""

    at: LowRankSite
    out: torch.Tensor
    name: str


class _Layer:
    """What all adapters of a layer share."""

    def __init__(self, site: Site, displacement: Displacement) -> None:
        self._site, self._displacement = site, displacement
        columns = site.head_columns(displacement.heads)
        self._dtype, self._device = site.weight.dtype, site.weight.device
        self._hidden, self._width = site.weight.shape
        self._starts = tuple(head * site.head_dim for head in displacement.heads)
        self._exact = exact_fold(columns, displacement.values)
        if not self._exact.isfinite().all():
            raise DamagedError(
                f"{site.name}: its fold is not finite: its locked columns hold NaN or infinite weights. Check the "
                "model, or download the checkpoint again."
            )
        self._for_kernel = self._exact.float()

    def rows(self, count: int) -> torch.Tensor:
        """W d for so many adapters, [count, hidden]: what is exact for those that leave the layer alone."""
        own = rounded_fold(self._exact, self._dtype, self._site.name)
        return own.to(self._device).repeat(count, 1)

    def adapted(self, low_rank: LowRank, name: str) -> LowRankSite:
        """An adapter at this layer, checked."""
        down, up, scale = (*(matrix.detach() for matrix in low_rank[:2]), float(low_rank[2]))
        self._check(down, up, scale, name)
        columns = HeadColumns(down, self._starts)
        by_kernel = kernel.runs_on(self._device) and {self._dtype, up.dtype} <= set(DTYPES) and up.shape[1] <= MAX_RANK
        shared = self._for_kernel if by_kernel else self._exact
        return LowRankSite(columns, self._displacement.values, up, scale, shared)

    def _check(self, down: torch.Tensor, up: torch.Tensor, scale: float, name: str) -> None:
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or 0 in down.shape:
            raise MismatchError(
                f"{name}: A is {list(down.shape)} and B {list(up.shape)}. Give A as [rank, {self._width}] and B as "
                f"[{self._hidden}, rank], as PEFT has them."
            )
        if (down.shape[1], up.shape[0]) != (self._width, self._hidden):
            raise MismatchError(
                f"{name}: A is {list(down.shape)} and B {list(up.shape)}, but the base's output projection is "
                f"[{self._hidden}, {self._width}]. The adapter is of another base, or of another module."
            )
        if down.dtype != up.dtype or not down.dtype.is_floating_point or down.dtype.itemsize < 2:
            raise UnsupportedError(
                f"{name}: A is {torch_name(down.dtype)} and B {torch_name(up.dtype)}; both must have one of {FOLDABLE}."
            )
        if {down.device, up.device} != {self._device}:
            raise FastlockError(
                f"{name}: A is on {down.device} and B on {up.device}, but the layer on {self._device}. Move them there."
            )
        if not math.isfinite(scale):
            raise DamagedError(f"{name}: its scale is {scale}; it must be a finite number.")


def _located(base: nn.Module | BareProjections, lock: Lock) -> list[tuple[Site, Any]]:
    """The base's locked sites, checked, each with the module that stands there (None for bare projections)."""
    if isinstance(base, dict):
        return [(site, None) for site in bare_sites(base, lock, "base")]
    if not is_peft_model(base):
        return [(site, site.module) for site in sites_for(base, lock)]
    inner: Any = base.get_base_model()  # type: ignore[operator]
    every = sites(inner)
    check_lock_fits(lock, len(every), text_config(inner), type(inner).__name__)
    layers = set(lock.layers.tolist())
    located = []
    for site in every:
        if site.layer in layers:
            if hasattr(site.outer, "modules_to_save"):
                raise UnsupportedError(
                    f"{site.name}: adapters have projections of their own here (modules_to_save). Relock them one by "
                    "one: fastlock.relock."
                )
            plain = replace(site, adapter=None)
            check_foldable(plain)
            located.append((plain, site.outer))
    return located


def _check_list(base: object, adapters: object) -> None:
    """Refuse what is no list of adapters, and names of adapters that the base does not have."""
    if not isinstance(adapters, Sequence) or isinstance(adapters, str):
        raise FastlockError(f"adapters is a {type(adapters).__name__}; give a list of adapters.")
    known: Any = getattr(base, "peft_config", {}) if is_peft_model(base) else {}
    for number, adapter in enumerate(adapters):
        if not isinstance(adapter, str | Mapping):
            raise FastlockError(
                f"adapters[{number}] is a {type(adapter).__name__}; give {{layer: (A, B, s)}}, or, where the base is a "
                "PeftModel, the name of one of its adapters."
            )
        if isinstance(adapter, str) and adapter not in known:
            has = f"its adapters are {', '.join(map(shown, known))}" if known else "it is no PeftModel"
            raise FastlockError(f"adapters[{number}]: the base has no adapter {shown(adapter)!r}: {has}.")


def _low_rank(adapter: ResidentAdapter, number: int, site: Site, module: Any) -> LowRank | None:
    """What an adapter has at a layer; None if it leaves that alone."""
    if not isinstance(adapter, str):
        low_rank = adapter.get(site.layer)
        if low_rank is not None and not _is_low_rank(low_rank):
            raise FastlockError(f"adapters[{number}][{site.layer}] is not (A, B, s), two matrices and a number.")
        return low_rank
    return _low_rank_in(module, adapter, number, site)


def _is_low_rank(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(matrix, torch.Tensor) for matrix in value[:2])
        and isinstance(value[2], int | float)
    )


def _low_rank_in(module: Any, adapter: str, number: int, site: Site) -> LowRank | None:
    """What an adapter of a PeftModel has at a layer."""
    if not hasattr(module, "get_base_layer"):
        return None
    cls, name = type(module), _named(adapter, number, site)
    if f"{cls.__module__}.{cls.__qualname__}" not in _PLAIN_LORA:
        raise UnsupportedError(
            f"{name} is a {cls.__module__}.{cls.__name__}, no plain LoRA. Relock this adapter by itself: "
            "fastlock.relock."
        )
    if module.merged_adapters:
        raise UnsupportedError(f"{name}: an adapter is merged into the base's weight. Unmerge it first.")
    if adapter not in module.lora_A:
        return None
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        raise UnsupportedError(f"{name} is a {variant}, no plain LoRA. Relock this adapter by itself: fastlock.relock.")
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]


def _named(adapter: ResidentAdapter, number: int, site: Site) -> str:
    """An adapter at a layer, for messages."""
    return f"{shown(adapter) if isinstance(adapter, str) else f'adapters[{number}]'}, {site.name}"


def _fold(folds: Sequence[_RowFold]) -> None:
    """All folds, by the kernel where there is one that is right, each variant in one launch; else by the reference."""
    groups: dict[tuple[torch.device, AdapterVariant] | None, list[_RowFold]] = {}
    for one in folds:
        by_kernel = kernel.runs_on(one.out.device) and one.at.shared.dtype == torch.float32
        key = (one.out.device, kernel.variant_of(one.at, one.out.dtype)) if by_kernel else None
        groups.setdefault(key, []).append(one)
    for key, members in groups.items():
        try:
            finite = _by_reference(members) if key is None else _by_kernel(members)
        except NoWayError:  # whose warnings said why
            finite = _by_reference(members)
        for one, is_finite in zip(members, finite, strict=True):
            if not is_finite:
                raise _not_finite(one)


def _by_kernel(members: Sequence[_RowFold]) -> Iterator[bool]:
    table = kernel.build_table([one.at for one in members], [one.out for one in members])
    kernel.launch(table)
    device = table.sites.device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return (not flag for flag in table.flags[1:].tolist())


def _by_reference(members: Sequence[_RowFold]) -> Iterator[bool]:
    fold_adapter_sites([one.at for one in members], [one.out for one in members])
    return (bool(one.out.isfinite().all()) for one in members)


def _not_finite(one: _RowFold) -> FastlockError:
    if exact_adapter_fold(one.at).isfinite().all():
        return too_strong(one.name, one.out.dtype)
    return DamagedError(
        f"{one.name}: its fold is not finite: its matrices hold NaN or infinite numbers. Load the adapter again."
    )
