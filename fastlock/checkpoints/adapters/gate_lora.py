"""A lock's gate as a LoRA, or within one: A gains the rows Vᵀ, and B the columns W′ U, of the adapted W′ = W + s B A.

(W′ + (W′ U) Vᵀ) x, in float64 and rounded once. Each row of A and its column of B are balanced by a power of two, which
changes no bit of their product: then both are far from what float16 cannot hold.

In PEFT's own terms each module may have a rank and an α of its own. Stacks that do not know these are given one rank
and one α for all modules: shorter ones end in zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastlock.architectures.adapter_stacks import ADAPTER_STACKS
from fastlock.checkpoints.adapters.adapter import ADAPTER_WEIGHTS, Adapter
from fastlock.checkpoints.adapters.adapter_files import JoinedFile, NewTensor, joined_tensors
from fastlock.checkpoints.adapters.folding import AdapterFold, AdapterFolds, adapted_site
from fastlock.checkpoints.adapters.methods.lora import lora_operands
from fastlock.checkpoints.adapters.methods.lora_scales import alpha_in, peft_scale, rank_in
from fastlock.checkpoints.adapters.methods.method import MAX_NUMBER
from fastlock.checkpoints.adapters.methods.products import times
from fastlock.checkpoints.adapters.module_paths import new_path
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import DamagedError, FastlockError, shown
from fastlock.kernels.fold.reference import HeadColumns, exact_fold
from fastlock.locks.gate import Gate

A, B, LORA_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class GateRows:
    """The gate of one layer, as a LoRA of scale 1 has it.

    Attributes:
        a: Vᵀ over the whole width, zeros off the locked heads, [rank, num_heads * head_dim] float64.
        b: W′ U, [hidden, rank] float64.
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, eq=False)
class GatedModule:
    """One locked projection of the LoRA that results.

    Attributes:
        layer: the decoder layer.
        path: of the projection, as the adapter names it.
        own: how many rows of A, and columns of B, were there before; those of the gate come next.
        rows: of the gate, B over the module's scale.
        a, b: the whole of A and B, as they are written.
        scale: s as PEFT has it.
    """

    layer: int
    path: str
    own: int
    rows: GateRows
    a: NewTensor
    b: NewTensor
    scale: float

    @property
    def written(self) -> torch.Tensor:
        """The gate's columns of B, as they are written: [hidden, rank]."""
        return self.rows.b.to(self.b.dtype)


@dataclass(frozen=True, eq=False)
class GateLora:
    """An adapter with the gate in it.

    Attributes:
        adapter: what it was before.
        config: its adapter_config.json.
        modules: the locked ones, by layer.
        tensors: all that it holds, by key.
    """

    adapter: Adapter
    config: dict[str, Any]
    modules: tuple[GatedModule, ...]
    tensors: dict[str, StoredTensor | NewTensor]

    def weights(self) -> JoinedFile:
        """Its safetensors file."""
        return joined_tensors(self.adapter.files.get(ADAPTER_WEIGHTS), self.tensors)


def is_uniform(stacks: tuple[str, ...]) -> bool:
    """Whether one of these stacks has one rank and one α for all modules of a LoRA."""
    return any(ADAPTER_STACKS[stack].scaling != "peft" for stack in stacks)


def gate_lora(folds: AdapterFolds, gates: Mapping[int, Gate], stacks: tuple[str, ...]) -> GateLora:
    """Put a gate into a LoRA.

    Args:
        folds: of the LoRA, with s as PEFT has it; of one without tensors, if the gate is to be a LoRA by itself.
        gates: by layer.
        stacks: those that are to load it.

    Raises:
        DamagedError: the adapter's A, B and config do not go together, or numbers are not finite.
        FastlockError: the strength is too large.
    """
    adapter, base = folds.adapter, folds.part.checkpoint
    rank = next(iter(gates.values())).rank
    paths = {fold.layer: fold.path or new_path(adapter, base, fold.site) for fold in folds}
    new = [paths[fold.layer] for fold in folds if not fold.touched]
    before = {path: _rank_of(adapter, path) for path in adapter.modules if A in adapter.modules[path]}
    after = before | {path: before.get(path, 0) + rank for path in paths.values()}
    scales = {path: scale_of(adapter, path) for path in before}
    if is_uniform(stacks) or not adapter.tensors:
        after = dict.fromkeys(after, max(after.values()))
        config = _uniform_config(adapter.config, max(after.values()), next(iter(scales.values()), 1.0), list(after))
    else:
        adapted = [
            path for path, parameters in adapter.modules.items() if any(n.startswith("lora_") for n in parameters)
        ]
        config = _config(adapter.config, {path: after[path] for path in paths.values()}, scales, new, adapted)
    modules = []
    for fold in folds:
        path, rows = paths[fold.layer], gate_rows(folds, fold, gates[fold.layer])
        scale = peft_scale(config, alpha_in(config, path, adapter.where), rank_in(config, path, adapter.where))
        modules.append(_gated(adapter, fold, path, rows, scale, after[path]))
    return GateLora(adapter, config, tuple(modules), _tensors(adapter, folds, tuple(modules), before, after))


def gate_rows(folds: AdapterFolds, fold: AdapterFold, gate: Gate) -> GateRows:
    """The gate of one layer of an adapted model, as a LoRA of scale 1 has it: Vᵀ, and W′ U of W′ = W + s B A.

    Args:
        folds: of the adapter, with s as PEFT has it.
        fold: one of these, of a LoRA or untouched.
        gate: of its layer.
    """
    columns, width = folds.part.columns(fold.site), fold.site.num_heads * fold.site.head_dim
    b = torch.stack([exact_fold(columns, writer) for writer in gate.writers], dim=1)
    if (at := adapted_site(folds.adapter, folds.part, fold.site)) is not None:
        operands = lora_operands(at)
        inner = HeadColumns.in_projection(operands.a, gate.heads, gate.head_dim)
        of_adapter = [times(operands.b, exact_fold(inner, writer)) for writer in gate.writers]
        b += operands.peft_scale * torch.stack(of_adapter, dim=1)
    a = gate.dense(width)[0].T
    balance = torch.tensor([_balance(row, column) for row, column in zip(a, b.T, strict=True)], dtype=torch.float64)
    return GateRows(a * balance[:, None], b / balance)


def scale_of(adapter: Adapter, path: str) -> float:
    """The s of a LoRA's module, as PEFT has it.

    Raises:
        DamagedError: its config gives none.
    """
    rank, alpha = _rank_of(adapter, path), alpha_in(adapter.config, path, adapter.where)
    if type(alpha) not in (int, float) or not abs(alpha) < MAX_NUMBER:
        raise DamagedError(f"{adapter.where}: {shown(path)[:200]} has no α. Download the adapter again.")
    return peft_scale(adapter.config, alpha, rank)


def _rank_of(adapter: Adapter, path: str) -> int:
    parameters, rank = adapter.modules[path], rank_in(adapter.config, path, adapter.where)
    a, b = parameters[A].shape, parameters[B].shape if B in parameters else ()
    if type(rank) is not int or rank <= 0 or len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
        raise DamagedError(
            f"{adapter.where}: {shown(path)[:200]} has an A and a B that do not go together, or not with the rank "
            f"{str(rank)[:40]!a} of its config. Download the adapter again."
        )
    return rank


def _balance(row: torch.Tensor, column: torch.Tensor) -> float:
    """The power of two by which a row of A grows, so that its largest number is about that of the column of B."""
    largest = float(row.abs().max()), float(column.abs().max())
    if not all(map(math.isfinite, largest)) or not all(largest):
        return 1.0
    return 2.0 ** round((math.log2(largest[1]) - math.log2(largest[0])) / 2)


def _gated(adapter: Adapter, fold: AdapterFold, path: str, rows: GateRows, scale: float, rank: int) -> GatedModule:
    """A locked projection with the rows of the gate after its own."""
    rows = GateRows(rows.a, rows.b / scale)
    a, b = fold.parameters.get(A), fold.parameters.get(B)
    dtype = torch.float32  # it holds what is there in fewer bits exactly
    for stored in (a, b):
        if stored is not None and stored.torch_dtype is not None:
            dtype = torch.promote_types(dtype, stored.torch_dtype)
    where = f"{adapter.where}: the gate of layer {fold.layer}"
    if not (rows.a.isfinite().all() and rows.b.isfinite().all()):
        raise DamagedError(f"{where} is not finite: weights or adapter hold NaN or infinite numbers.")
    if not (rows.a.to(dtype).isfinite().all() and rows.b.to(dtype).isfinite().all()):
        raise FastlockError(f"{where} is not finite in {dtype}: the strength is too large for this dtype. Lower it.")
    own = 0 if a is None else a.shape[0]
    return GatedModule(
        fold.layer,
        path,
        own,
        rows,
        NewTensor(dtype, (rank, rows.a.shape[1]), _rows_after(adapter, a, rows.a, rank, dtype)),
        NewTensor(dtype, (rows.b.shape[0], rank), _columns_after(adapter, b, rows.b, rank, dtype)),
        scale,
    )


def _rows_after(
    adapter: Adapter, stored: StoredTensor | None, rows: torch.Tensor, rank: int, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """What makes an A: the rows that are there, then new ones, then zeros up to a rank."""

    def make() -> torch.Tensor:
        whole, own = torch.zeros(rank, rows.shape[1], dtype=dtype), 0 if stored is None else stored.shape[0]
        if stored is not None:
            whole[:own] = adapter.read(stored)
        whole[own : own + len(rows)] = rows
        return whole

    return make


def _columns_after(
    adapter: Adapter, stored: StoredTensor | None, columns: torch.Tensor, rank: int, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """What makes a B: the columns that are there, then new ones, then zeros up to a rank."""

    def make() -> torch.Tensor:
        whole, own = torch.zeros(columns.shape[0], rank, dtype=dtype), 0 if stored is None else stored.shape[1]
        if stored is not None:
            whole[:, :own] = adapter.read(stored)
        whole[:, own : own + columns.shape[1]] = columns
        return whole

    return make


def _tensors(
    adapter: Adapter,
    folds: AdapterFolds,
    modules: tuple[GatedModule, ...],
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> dict[str, StoredTensor | NewTensor]:
    """All that the adapter holds then, by key."""
    keys = {id(tensor): key for key, tensor in adapter.tensors.items()}
    tensors: dict[str, StoredTensor | NewTensor] = dict(adapter.tensors)
    locked = {module.path: module for module in modules}
    for path, rank in before.items():
        stored_a, stored_b = adapter.modules[path][A], adapter.modules[path][B]
        if path in locked:
            tensors[keys[id(stored_a)]], tensors[keys[id(stored_b)]] = locked[path].a, locked[path].b
        elif after[path] > rank:
            tensors[keys[id(stored_a)]] = _padded(adapter, stored_a, (after[path], stored_a.shape[1]))
            tensors[keys[id(stored_b)]] = _padded(adapter, stored_b, (stored_b.shape[0], after[path]))
    for module, fold in zip(modules, folds, strict=True):
        if not fold.touched:
            tensors[f"{_PREFIX}{module.path}.{A}"], tensors[f"{_PREFIX}{module.path}.{B}"] = module.a, module.b
            if adapter.config.get("lora_bias"):  # PEFT then wants one in every module
                shape, dtype = (module.b.shape[0],), module.b.dtype
                zeros = partial(torch.zeros, shape, dtype=dtype)
                tensors[f"{_PREFIX}{module.path}.{LORA_BIAS}"] = NewTensor(dtype, shape, zeros)
    return tensors


def _padded(adapter: Adapter, stored: StoredTensor, shape: tuple[int, int]) -> NewTensor:
    """A matrix with zeros after its last row, or its last column."""
    dtype = stored.torch_dtype or adapter.read(stored).dtype  # which refuses it

    def make() -> torch.Tensor:
        whole = torch.zeros(shape, dtype=dtype)
        whole[: stored.shape[0], : stored.shape[1]] = adapter.read(stored)
        return whole

    return NewTensor(dtype, shape, make)


def _config(
    config: dict[str, Any], ranks: dict[str, int], scales: Mapping[str, float], new: list[str], targets: list[str]
) -> dict[str, Any]:
    """The new adapter_config.json, with ranks and αs of the locked modules' own; each keeps its s, and new ones have 1.

    Args:
        config: as it was.
        ranks: of the locked modules, by path.
        scales: of those that were there, by path.
        new: the paths of those that were not.
        targets: the paths of all modules that were there.
    """
    changed = _plainly_started(config)
    by_root = bool(config.get("use_rslora"))
    alphas = {path: _alpha(scales.get(path, 1.0), rank, by_root) for path, rank in ranks.items()}
    for key, own in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        others = {name: value for name, value in (config.get(key) or {}).items() if name not in own}
        changed[key] = own | others  # the first that matches holds
    return _with_targets(changed, [*targets, *new]) if new else changed


def _uniform_config(config: dict[str, Any], rank: int, scale: float, targets: list[str]) -> dict[str, Any]:
    """The new adapter_config.json, with one rank and one α for all modules."""
    changed = _plainly_started(config) | {"r": rank, "lora_alpha": _alpha(scale, rank, False), "use_rslora": False}
    return _with_targets(changed | {"rank_pattern": {}, "alpha_pattern": {}}, targets)


def _plainly_started(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose start takes any rank: PEFT replaces by what it loads whatever that sets."""
    return config | {"init_lora_weights": True} if isinstance(config.get("init_lora_weights"), str) else dict(config)


def _with_targets(config: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    """Every module by its whole path, which PEFT takes whatever patterns and lists of layers say."""
    without = {"exclude_modules": None} if "exclude_modules" in config else {}
    return config | {"target_modules": targets} | without


def _alpha(scale: float, rank: int, by_root: bool) -> float:
    """The α that gives this s, to the bit where there is one; a whole number as an integer."""
    divisor = math.sqrt(rank) if by_root else rank
    near = scale * divisor
    candidates = (near, float(round(near)), math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    alpha = next((alpha for alpha in candidates if alpha / divisor == scale), near)
    return int(alpha) if alpha.is_integer() else alpha
