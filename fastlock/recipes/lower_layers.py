"""What enters the first layer that is trained, read once: nothing below it changes from step to step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastlock.inference.generation import input_device
from fastlock.models.sites import family_of, sites
from fastlock.recipes.lessons import Row


class LowerLayers:
    """The decoder layers of a model below the first one that is trained.

    Args:
        model: a transformers model, in eval mode, whose weights stay as they are.
        first: the first layer that is trained, from 0.
    """

    def __init__(self, model: nn.Module, first: int) -> None:
        projection = f".{family_of(model).projection}"
        layers = [model.get_submodule(site.name.removesuffix(projection)) for site in sites(model)]
        self.model, self.below, self.trained = model, layers[:first], layers[first]

    @torch.no_grad()
    def read(self, batch: Sequence[Row]) -> list[torch.Tensor | None]:
        """What enters the first trained layer, of each row: [tokens, hidden] on the CPU; None where it is not plain."""
        if not self.below:
            return [None] * len(batch)
        entered: list[Any] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs.get("hidden_states"))
            raise _EnoughError

        handles = [self.trained.register_forward_pre_hook(note, with_kwargs=True)]
        returned: list[Any] = []
        handles.append(self.below[-1].register_forward_hook(lambda _module, _args, output: returned.append(output)))
        try:
            with contextlib.suppress(_EnoughError):
                width = max(len(row.ids) for row in batch)
                padded = [[*row.ids, *[row.ids[-1]] * (width - len(row.ids))] for row in batch]
                self.model(input_ids=torch.tensor(padded, device=input_device(self.model)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        plain = entered and isinstance(entered[0], torch.Tensor) and returned[0] is entered[0]
        if not plain:
            return [None] * len(batch)
        return [states[: len(row.ids)].cpu().clone() for states, row in zip(entered[0], batch, strict=True)]

    @contextlib.contextmanager
    def skipped(self, states: Sequence[torch.Tensor | None], shared: int = 0) -> Iterator[None]:
        """Let a forward pass of these rows begin at the first trained layer, with what `read` gave of each.

        Args:
            states: of each row.
            shared: how many tokens of each, from the start, the pass does not read, since its cache has them.
        """
        known = [row[shared:] for row in states if row is not None]
        if not self.below or len(known) < len(states):
            yield
            return
        width = max(map(len, known))
        together = torch.stack([torch.cat([row, row[-1:].expand(width - len(row), -1)]) for row in known])
        with contextlib.ExitStack() as undo:
            for layer in self.below[:-1]:
                undo.enter_context(_replaced(layer, lambda hidden_states, *_args, **_kwargs: hidden_states))
            undo.enter_context(_replaced(self.below[-1], lambda hidden_states, *_a, **_k: together.to(hidden_states)))
            yield


class _EnoughError(Exception):
    """What was wanted of a forward pass is there."""


@contextlib.contextmanager
def _replaced(layer: nn.Module, forward: Any) -> Iterator[None]:
    """Let a layer do something else; afterwards it has the forward that it had."""
    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
