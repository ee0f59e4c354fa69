"""What a plan keeps of models whose locks have a gate: little, as everything is looked up and folded anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from fastlock.locks.lock import Lock
from fastlock.locks.receipt import Receipt
from fastlock.models.columns import (
    ORIGINAL_COLUMNS,
    PLACED_COLUMNS,
    gated_heads,
    holds_gate,
    keep_columns,
    present_columns,
)
from fastlock.models.members import prepare
from fastlock.models.placing import gate_unchanged
from fastlock.models.relocking import changing, fold_in
from fastlock.models.sites import BareProjections, sites, unwrapped


class GatedBuilt:
    """Models as a plan relocked them with a gate, one at least.

    A gate is written into the weights that it is folded through. So at each run a site whose locked columns are those
    that were written last starts from the original ones, which are kept; any other from what is there, as that must be
    another fine-tune.

    Attributes:
        sound: whether what is noted here is true: always.

    Raises:
        FastlockError, and its kinds: as for `fastlock.relock`; then nothing was changed.
    """

    sound = True

    def __init__(
        self,
        models: Sequence[nn.Module | BareProjections],
        locks: Sequence[Lock],
        strengths: Sequence[float],
        earlier: GatedBuilt | None,
    ) -> None:
        with changing() as undo:
            if earlier is not None:
                take_new_originals(models, undo)
            self._members = prepare(models, locks, strengths, undo)
            self._receipts = fold_in(self._members, undo)
            modules = [site.module for member in self._members if member.has_bias for site in member.sites]
            if earlier is not None:
                _use_memory_of(earlier._memory, modules, undo)
            self._memory: dict[nn.Module, torch.Tensor] = {module: module.bias.data for module in modules}

    def biases(self) -> list[dict[int, torch.Tensor]]:
        """As `fastlock.Plan.biases`: empty where the lock is a gate alone."""
        return [
            {site.layer: site.bias for site in member.sites if site.bias is not None} if member.has_bias else {}
            for member in self._members
        ]

    def receipts(self) -> list[Receipt | None]:
        """As `fastlock.Plan.receipts`; their digests notice what was changed since."""
        return self._receipts

    def moved(self) -> bool:
        """Whether what was looked up is elsewhere now: nobody relies on it."""
        return False

    def again(self, locks: Sequence[Lock], strengths: Sequence[float]) -> bool:
        """Whether this could be used once more: never."""
        return False


def take_new_originals(models: Sequence[nn.Module | BareProjections], undo: ExitStack) -> None:
    """Where locked columns are not those that a gate wrote, take them for the original ones."""
    for model in models:
        if isinstance(model, dict):
            continue
        for site in sites(unwrapped(model, adapters=True)):
            module = site.module
            if holds_gate(module) and not gate_unchanged(site):
                heads, new = gated_heads(module), present_columns(site, gated_heads(module))
                earlier = getattr(module, ORIGINAL_COLUMNS), getattr(module, PLACED_COLUMNS)
                undo.callback(keep_columns, module, heads, *earlier, ExitStack())
                keep_columns(module, heads, new, new, ExitStack())


def _use_memory_of(earlier: dict[nn.Module, torch.Tensor], modules: Sequence[nn.Module], undo: ExitStack) -> None:
    """Let new biases lie where the earlier ones of these modules lay, as CUDA graphs read them there."""
    for module in modules:
        bias, memory = module.bias, earlier.get(module)
        if memory is None or not isinstance(bias, nn.Parameter) or _kind(memory) != _kind(bias):
            continue
        undo.callback(setattr, bias, "data", bias.data)
        undo.callback(memory.copy_, memory.clone())
        memory.copy_(bias.data)
        bias.data = memory


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
