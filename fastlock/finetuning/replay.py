"""Layers that answer from memory: what they made of a batch once is not computed again for every range.

While a batch is first read, each layer's output and cache are recorded. Later passes over the same batch replay the
layers below a range, which would compute the same again; the tokens that follow the batch are computed as usual.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Recording:
    """What one layer made of a batch.

    Attributes:
        output: what it returned.
        cache: its part of the cache afterwards; None where there is none.
    """

    output: Any
    cache: Any


@contextlib.contextmanager
def recording(layers: Sequence[tuple[int, nn.Module]]) -> Iterator[dict[int, Recording]]:
    """Record what layers make of the first batch that they read.

    Args:
        layers: their numbers, and they themselves.

    Yields:
        By the number of the layer, filled while the batch is read.
    """
    recorded: dict[int, Recording] = {}

    def hook(number: int, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if number not in recorded:
            cache = _cache(arguments, keywords)
            part = None if cache is None else copy.copy(cache.layers[number])
            recorded[number] = Recording(_copied(output), part)

    with contextlib.ExitStack() as undo:
        for number, layer in layers:
            handle = layer.register_forward_hook(
                lambda _module, arguments, keywords, output, number=number: hook(number, arguments, keywords, output),
                with_kwargs=True,
            )
            undo.callback(handle.remove)
        yield recorded


@contextlib.contextmanager
def replaying(layers: Sequence[nn.Module], recorded: Sequence[Recording]) -> Iterator[None]:
    """Let the first layers of a model answer the next batch from what was recorded of it.

    Args:
        layers: of the model.
        recorded: of its first layers, in order.
    """
    with contextlib.ExitStack() as undo:
        for number, one in enumerate(recorded):
            _replay(layers[number], number, one, undo)
        yield


def _replay(layer: nn.Module, number: int, recorded: Recording, undo: contextlib.ExitStack) -> None:
    compute, answered = layer.forward, False

    def forward(*arguments: Any, **keywords: Any) -> Any:
        nonlocal answered
        if answered:
            return compute(*arguments, **keywords)
        answered = True
        cache = _cache(arguments, keywords)
        if cache is not None and recorded.cache is not None:
            cache.layers[number] = copy.copy(recorded.cache)
        return _copied(recorded.output)

    own = "forward" in layer.__dict__
    undo.callback(setattr, layer, "forward", compute) if own else undo.callback(layer.__dict__.pop, "forward", None)
    layer.forward = forward


def _cache(arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """The cache among the arguments of a layer; None without one."""
    from transformers.cache_utils import Cache

    return next((one for one in (*arguments, *keywords.values()) if isinstance(one, Cache)), None)


def _copied(output: Any) -> Any:
    """An output that no later layer can write to: a tensor, or a tuple that begins with one."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    return (output[0].clone(), *output[1:])
