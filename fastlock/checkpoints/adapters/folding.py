"""What a lock's displacement does in an adapted model: f = layer(d) - layer(0) at each locked layer, in float64.

Of the base, W d is computed once and passed in (`BasePart`), so that each further adapter costs its own bytes alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fastlock.checkpoints.adapters.adapter import Adapter, no_such_module, plain_path
from fastlock.checkpoints.adapters.methods.lora_kinds import check_whole_adapter
from fastlock.checkpoints.adapters.methods.method import SCALINGS, Action, AdaptedSite, Effect, Scaling
from fastlock.checkpoints.adapters.methods.own_weight import OWN_BIASES, OWN_WEIGHT, own_weight
from fastlock.checkpoints.adapters.methods.table import check_method, method_at
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import DamagedError, FastlockError, shown
from fastlock.kernels.fold.reference import HeadColumns, exact_fold, magnitude
from fastlock.locks.lock import Displacement, Lock, check_lock, strength_for

# Where transformers may call a module otherwise than the files do: in the place of a feedforward network with experts.
_EXPERTS = re.compile(r"(?:^|\.)(?:mlp|moe|block_sparse_moe|feed_forward)\.")


@dataclass(frozen=True, eq=False)
class BasePart:
    """W d of a base at every locked layer: what all of its adapters share.

    Attributes:
        checkpoint: the base.
        lock, strength: what it is of.
        sites: the locked ones, layers ascending.
        displacements: by layer.
        products: W d by layer, [hidden] float64, without the base's own bias.
        digests: SHA-256 of the columns read, by layer.
    """

    checkpoint: Checkpoint
    lock: Lock
    strength: float
    sites: tuple[StoredSite, ...]
    displacements: dict[int, Displacement]
    products: dict[int, torch.Tensor]
    digests: dict[int, bytes]

    @cached_property
    def modules(self) -> dict[str, tuple[int, ...] | None]:
        """Every module, and those around them, by `plain_path`: the shape of its weight, None where it has none."""
        found: dict[str, tuple[int, ...] | None] = {"lm_head": None}
        for name, tensor in self.checkpoint.shards.tensors.items():
            path, _, last = plain_path(name).rpartition(".")
            if last == "weight":
                found[path] = tensor.shape
            while path and path not in found:
                found[path] = None
                path = path.rpartition(".")[0]
        return found

    @cached_property
    def magnitudes(self) -> dict[int, torch.Tensor]:
        """|W||d| by layer, [hidden] float64: the columns are read anew for it, once."""
        return {site.layer: magnitude(self.columns(site), self.displacements[site.layer].values) for site in self.sites}

    @cached_property
    def has_experts(self) -> bool:
        """Whether its layers have experts, whose modules transformers calls otherwise than the files."""
        return any("experts" in path.split(".") for path in self.modules)

    def columns(self, site: StoredSite) -> HeadColumns:
        """The locked columns of W of one site: read anew at each call."""
        return self.checkpoint.read_columns(site, self.displacements[site.layer].heads).columns

    def whole_weight(self, site: StoredSite) -> torch.Tensor:
        """W of one site, [hidden, num_heads * head_dim] float64: read anew at each call."""
        return self.checkpoint.read_columns(site, range(site.num_heads)).columns.matrix.double()

    def largest(self, adapter: Adapter, site: StoredSite) -> tuple[int, int]:
        """The longest output and the longest input of the modules that an adapter adapts, in this site's layout."""
        shapes = [self.modules.get(plain) for plain in adapter.paths if plain]
        known = [shape for shape in shapes if shape is not None and len(shape) == 2]
        rows, columns = (max((shape[i] for shape in known), default=0) for i in range(2))
        return (columns, rows) if site.transposed else (rows, columns)


@dataclass(frozen=True, eq=False)
class AdapterFold:
    """What the displacement does at one locked layer of an adapted model.

    Attributes:
        layer: the decoder layer.
        site: its output projection, as the base stores it.
        path: of that, as the adapter names it; None if the adapter leaves it alone.
        parameters: what the adapter stores of it, by what PEFT calls the parameter ("lora_B.bias").
        bias: f = layer(d) - layer(0), [hidden] float64: what is to be added to the output of the adapted layer. No
            bias that base or adapter already have is part of it.
        base_part: W d, [hidden] float64.
        action: what the adapter does with the base's projection, "untouched", "added", "scaled" or "replaced".
        scale: s as the scale rule has it, None where there is none.
        peft_scale: s as PEFT has it.
        digest: SHA-256 of what was read of the adapter.
        base_digest: SHA-256 of the base's columns.
    """

    layer: int
    site: StoredSite
    path: str | None
    parameters: dict[str, StoredTensor]
    bias: torch.Tensor
    base_part: torch.Tensor
    action: Action
    scale: float | None
    peft_scale: float | None
    digest: bytes
    base_digest: bytes

    @property
    def touched(self) -> bool:
        """Whether the adapter touches this projection."""
        return self.action != "untouched"

    @property
    def base_bias(self) -> torch.Tensor | None:
        """What the bias of the base's projection must gain to shift the adapted layer by f, [hidden] float64.

        It is f where the adapter adds to the base's output, and W d where it leaves that alone or scales it, bias and
        all. None: no bias of the base acts, as the adapter has a projection of its own.
        """
        by_action = {"untouched": self.base_part, "added": self.bias, "scaled": self.base_part, "replaced": None}
        return by_action[self.action]

    @property
    def shares_base(self) -> bool:
        """Whether W d in the base's bias is exact: then one relocked base serves this adapter and itself."""
        return self.action in ("untouched", "scaled")

    @property
    def gap(self) -> float:
        """‖f − W d‖ / ‖W d‖: how far the base's own fold is from this one. Infinite where only W d is zero."""
        return _gap(float((self.bias - self.base_part).norm()), float(self.base_part.norm()))


@dataclass(frozen=True, eq=False)
class AdapterFolds:
    """An adapter folded at every locked layer of its base.

    Attributes:
        adapter: the adapter.
        part: the base, the lock and the strength.
        scaling: the scale rule that was followed.
        folds: by layer, ascending.
    """

    adapter: Adapter
    part: BasePart
    scaling: Scaling
    folds: tuple[AdapterFold, ...]

    def __iter__(self) -> Iterator[AdapterFold]:
        return iter(self.folds)

    @property
    def shares_base(self) -> bool:
        """Whether one relocked base is exact for this adapter, too."""
        return all(fold.shares_base for fold in self.folds)

    @property
    def gap(self) -> float:
        """‖f − W d‖ / ‖W d‖ over all locked layers together."""
        apart = math.hypot(*(float((fold.bias - fold.base_part).norm()) for fold in self.folds))
        return _gap(apart, math.hypot(*(float(fold.base_part.norm()) for fold in self.folds)))


def base_part(base: Checkpoint, lock: Lock, strength: float | None = None) -> BasePart:
    """Read the base's locked columns, and compute W d at every locked layer.

    Args:
        base: the checkpoint that adapters are of; a quantised one is read as it is served.
        lock: the lock of its aligned base. Of one with a gate, d is the constant part alone: `gate_rows` has the gate.
        strength: the paper's α; by default as for `fastlock.relock`.

    Raises:
        FastlockError, and its kinds: as for `fastlock.relock_checkpoint`.
    """
    check_lock(lock)
    strength = strength_for(lock, strength)
    sites, displacements = tuple(base.sites_for(lock)), lock.constant(strength)
    products, digests = {}, {}
    for site in sites:
        displacement = displacements[site.layer]
        stored = base.read_columns(site, displacement.heads)
        products[site.layer] = exact_fold(stored.columns, displacement.values)
        digests[site.layer] = stored.digest()
        if not products[site.layer].isfinite().all():
            raise DamagedError(
                f"{base.where}: {shown(site.name)}: its fold is not finite: its locked columns hold NaN or infinite "
                "weights. Download the checkpoint again."
            )
    return BasePart(base, lock, strength, sites, displacements, products, digests)


def fold_adapter(
    adapter: Adapter,
    base: Checkpoint,
    lock: Lock,
    strength: float | None = None,
    scaling: Scaling = "peft",
    part: BasePart | None = None,
) -> AdapterFolds:
    """f = layer(d) - layer(0) in float64 at every locked layer of an adapted model, from files alone.

    Args:
        adapter: of `open_adapter`.
        base: the checkpoint that it is served over.
        lock: the lock of the aligned base.
        strength: the paper's α; by default as for `fastlock.relock`.
        scaling: the scale rule of the stack that serves it, "peft", "sglang" or "llama.cpp".
        part: `base_part` of the same base, lock and strength, where it is at hand.

    Raises:
        UnsupportedError: the method's effect is no constant, or cannot be told; or a dtype is not read.
        DamagedError: the adapter's files are damaged, or hold NaN or infinities.
        MismatchError: the adapter is of another base.
        FastlockError: an argument is wrong.
    """
    if scaling not in SCALINGS:
        raise FastlockError(f"scaling is {scaling!r}; it must be one of {', '.join(map(repr, SCALINGS))}.")
    part = base_part(base, lock, strength) if part is None else part
    check_method(adapter)
    check_whole_adapter(adapter.config, adapter.where)
    _check_modules(adapter, part)
    return AdapterFolds(adapter, part, scaling, tuple(_fold_at(adapter, part, site, scaling) for site in part.sites))


def adapted_site(adapter: Adapter, part: BasePart, site: StoredSite, scaling: Scaling = "peft") -> AdaptedSite | None:
    """An adapter at one locked output projection, None where it leaves that alone."""
    path = adapter.path_of(site)
    if path is None:
        return None
    return AdaptedSite(
        adapter,
        site,
        path,
        adapter.modules[path],
        part.displacements[site.layer],
        part.products[site.layer],
        lambda: part.columns(site),
        lambda: part.whole_weight(site),
        lambda: part.largest(adapter, site),
        scaling,
    )


def _fold_at(adapter: Adapter, part: BasePart, site: StoredSite, scaling: Scaling) -> AdapterFold:
    at, product = adapted_site(adapter, part, site, scaling), part.products[site.layer]
    effect = Effect(product, "untouched", None, None, ()) if at is None else _effect(at)
    if not math.isfinite(float(effect.shift.sum())):  # no fold is so large that its sum overflows
        raise DamagedError(
            f"{adapter.where}: its fold in layer {site.layer} is not finite: its tensors hold NaN or infinite numbers. "
            "Download the adapter again."
        )
    digest = hashlib.sha256()
    for tensor in effect.read:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return AdapterFold(
        site.layer,
        site,
        None if at is None else at.path,
        {} if at is None else dict(at.parameters),
        effect.shift,
        product,
        effect.action,
        effect.scale,
        effect.peft_scale,
        digest.digest(),
        part.digests[site.layer],
    )


def _effect(at: AdaptedSite) -> Effect:
    """What an adapter does at a projection of which it stores something.

    A bias of the base that the adapter holds itself (`bias: "all"`) takes the place of the base's, a lock in it too.
    """
    parameters = {name: tensor for name, tensor in at.parameters.items() if name not in OWN_BIASES}
    if not parameters:
        return Effect(at.base_part, "replaced", None, None, ())
    if OWN_WEIGHT in parameters:
        return own_weight(at)
    effect = method_at(at.adapter, at.path)(replace(at, parameters=parameters))
    return effect if len(parameters) == len(at.parameters) else replace(effect, action="replaced")


def _check_modules(adapter: Adapter, part: BasePart) -> None:
    """Raise if the adapter adapts a module that the base does not have."""
    for plain, path in adapter.paths.items():
        if plain and plain not in part.modules and not (part.has_experts and _EXPERTS.search(plain)):
            raise no_such_module(adapter.where, path, part.checkpoint.where)


def _gap(apart: float, whole: float) -> float:
    return apart / whole if whole else math.inf if apart else 0.0
