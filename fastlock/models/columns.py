"""The locked columns of weights that a gate is written into: as they are, and as they were before."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.errors import UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.sites import Site

# Buffers beside a weight that a gate was written into, which move with it: its locked columns as they were before, and
# as they were written, [hidden, heads * head_dim] each; and the attribute that says which heads these are.
ORIGINAL_COLUMNS = "fastlock_original_columns"
PLACED_COLUMNS = "fastlock_placed_columns"
_HEADS = "fastlock_gated_heads"
# The modules of this process that have them.
_GATED: weakref.WeakSet[Any] = weakref.WeakSet()

_ADAPTER = "make an adapter of the lock on disk (fastlock relock), which leaves the weights as they are"


@dataclass(frozen=True, eq=False)
class GatedColumns:
    """Columns of a weight that a gate is to be written into, [hidden, heads * head_dim] each, in memory of their own.

    Attributes:
        placed: with the gate.
        original: without it; None for what is in the weight just before it is written to.
    """

    placed: torch.Tensor
    original: torch.Tensor | None = None


def holds_gate(module: Any) -> bool:
    """Whether a gate was written into a module's weight."""
    return hasattr(module, PLACED_COLUMNS)


def gated_weights() -> list[tuple[nn.Module, torch.Tensor]]:
    """The modules of this process into whose weights a gate was written, with these weights."""
    weights = [(module, getattr(module, "weight", None)) for module in _GATED]
    return [(module, weight) for module, weight in weights if isinstance(weight, torch.Tensor)]


def note_copy(model: nn.Module) -> None:
    """Take note of the gates in a copy of a relocked model."""
    _GATED.update(module for module in model.modules() if holds_gate(module))


def gated_heads(module: Any) -> tuple[int, ...]:
    """The heads whose columns a gate was written into, ascending."""
    heads: tuple[int, ...] = module.__dict__[_HEADS]
    return heads


def present_columns(site: Site, heads: Sequence[int]) -> torch.Tensor:
    """The columns that these heads' outputs meet, as they are now: a copy, [hidden, len(heads) * head_dim]."""
    weight, size = site.weight, site.head_dim
    return torch.cat([weight[:, head * size : (head + 1) * size] for head in heads], dim=1)


def placed_columns(site: Site) -> torch.Tensor:
    """The columns that a gate was written into, as it was written: [hidden, heads * head_dim] of the weight's dtype."""
    placed: torch.Tensor = getattr(site.module, PLACED_COLUMNS)
    return placed.to(site.weight)


def original_columns(site: Site, heads: Sequence[int]) -> HeadColumns:
    """The columns that these heads' outputs meet, without what a gate made of them."""
    module = site.module
    if not holds_gate(module):
        return site.head_columns(heads)
    kept, of_gate, size = getattr(module, ORIGINAL_COLUMNS), gated_heads(module), site.head_dim
    if tuple(heads) == of_gate:
        return HeadColumns.side_by_side(kept, size)
    weight, blocks = site.weight, []
    for head in heads:
        matrix, number = (kept, of_gate.index(head)) if head in of_gate else (weight, head)
        blocks.append(matrix[:, number * size : (number + 1) * size])
    return HeadColumns.side_by_side(torch.cat(blocks, dim=1), size)


def write_columns(site: Site, heads: Sequence[int], columns: torch.Tensor) -> None:
    """Write these heads' columns, [hidden, len(heads) * head_dim], into the weight: in place, and torch counts it."""
    matrix, size = site.weight, site.head_dim
    with torch.inference_mode(matrix.is_inference()), torch.no_grad():
        for i, head in enumerate(heads):
            matrix[:, head * size : (head + 1) * size].copy_(columns[:, i * size : (i + 1) * size])


def place_columns(site: Site, heads: Sequence[int], columns: GatedColumns, undo: ExitStack) -> None:
    """Write columns of a gate, and keep these, and what was there before: from now on they are the module's."""
    original = present_columns(site, heads) if columns.original is None else columns.original
    keep_columns(site.module, heads, original, columns.placed, undo)
    undo.callback(write_columns, site, heads, original)
    write_columns(site, heads, columns.placed)


def restore_columns(site: Site, undo: ExitStack) -> None:
    """Put back what was there before."""
    module = site.module
    heads, original, placed = gated_heads(module), getattr(module, ORIGINAL_COLUMNS), getattr(module, PLACED_COLUMNS)
    undo.callback(keep_columns, module, heads, original, placed, ExitStack())
    forget_columns(module)
    undo.callback(write_columns, site, heads, present_columns(site, heads))
    write_columns(site, heads, original)


def keep_columns(
    module: nn.Module, heads: Sequence[int], original: torch.Tensor, placed: torch.Tensor, undo: ExitStack
) -> None:
    """Keep columns in buffers that move with the module."""
    undo.callback(forget_columns, module)
    module.register_buffer(ORIGINAL_COLUMNS, original, persistent=False)
    module.register_buffer(PLACED_COLUMNS, placed, persistent=False)
    module.__dict__[_HEADS] = tuple(heads)
    _GATED.add(module)


def forget_columns(module: nn.Module) -> None:
    """Drop what `keep_columns` kept."""
    for name in (ORIGINAL_COLUMNS, PLACED_COLUMNS, _HEADS):
        if hasattr(module, name):
            delattr(module, name)
    _GATED.discard(module)


def check_rewritable(site: Site) -> None:
    """Refuse a site into whose weight no gate can be written.

    Raises:
        UnsupportedError: it is quantised or adapted, or several of its numbers are one in memory.
    """
    if site.adapter is not None or not site.projection.in_place:
        raise UnsupportedError(
            f"{site.name} is quantised or adapted, and the gate of a lock is written into a plain weight. Merge the "
            f"adapters (merge_and_unload), or load the checkpoint unquantised; or {_ADAPTER}."
        )
    weight = site.weight
    if any(step == 0 and size > 1 for size, step in zip(weight.shape, weight.stride(), strict=True)):
        raise UnsupportedError(
            f"{site.name}.weight is expanded: many of its numbers are one in memory, and a gate cannot be written into "
            "it. Give the module a weight of its own (nn.Parameter(weight.detach().clone())), then relock."
        )


def check_not_around(site: Site) -> None:
    """Refuse adapters that were put around a projection after a gate was written into it.

    Raises:
        UnsupportedError: there are some.
    """
    if site.adapter is not None and holds_gate(site.module):
        raise UnsupportedError(
            f"{site.name}: adapters were put around a projection whose weight holds the gate of a lock. Unlock first "
            "(fastlock.unlock(model)), then relock."
        )


# Where a tensor lies: its device, and the first byte and the one after the last that it reaches.
Extent = tuple[torch.device, int, int]


def extent_of(tensor: Any) -> Extent | None:
    """Where a tensor lies in memory; None for what is no plain tensor, or has no memory of its own."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    if tensor.device.type == "meta":
        return None
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlap(one: Extent | None, other: Extent | None) -> bool:
    """Whether two tensors have memory in common, or may have: numbers that lie between another's count as its own."""
    if one is None or other is None or one[0] != other[0]:
        return False
    return one[1] < other[2] and other[1] < one[2]


def shares_memory(name: str, other: str) -> UnsupportedError:
    """The error of a weight whose memory is another tensor's, too."""
    return UnsupportedError(
        f"{name}.weight shares its memory with {other}: the gate of a lock, which is written into it, would act there "
        f"too. Give each its own (nn.Parameter(weight.detach().clone())), or {_ADAPTER}."
    )
