"""What is trained of a gate: its numbers, where it acts, and in which heads it stays.

Where a gate is to be in some heads only, these are chosen after half of the steps: those that change most of what the
layers say, with each number of x in its own standard deviations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.models.sites import Site
from fastlock.recipes.harm_probe import HarmProbe
from fastlock.recipes.head_scores import largest


@dataclass(frozen=True)
class GateSettings:
    """How a gate is trained; the attributes are arguments of `train_lock`, all checked."""

    rank: int
    constant: bool
    layers: tuple[int, ...] | None
    heads: int | None
    steps: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class TrainedGate:
    """The layers with a gate, and what was learned for each, over the whole input of its output projection.

    Attributes:
        layers: ascending.
        readers, writers: V and U, [layers, width, rank] float32.
        constant: d, [layers, width] float32, with the centre absorbed; None for a gate alone.
        kept: which heads are to have them, [layers, num_heads] bool.
    """

    layers: tuple[int, ...]
    readers: torch.Tensor
    writers: torch.Tensor
    constant: torch.Tensor | None
    kept: torch.Tensor


@dataclass(frozen=True)
class GateWeights:
    """What is trained, over the whole inputs of some layers' output projections.

    Attributes:
        layers: which, ascending.
        deviations: the standard deviation of each number of x at the ends of the prompts, [layers, width]; at least a
            tenth of the layer's mean, so that a number that hardly ever changes does not decide which heads are kept.
        kept: which heads take part, [layers, num_heads] bool.
        readers: V divided by `sizes`, [layers, width, rank].
        sizes: the root mean square of each column of V at the start, [layers, 1, rank].
        writers: U, [layers, width, rank].
        centre: Vᵀ x̄ at the start, which is taken from Vᵀ x, [layers, rank]; zeros for a gate alone.
        constant: d, [layers, width]; None for a gate alone.
    """

    layers: tuple[int, ...]
    deviations: torch.Tensor
    kept: torch.Tensor
    readers: torch.Tensor
    sizes: torch.Tensor
    writers: torch.Tensor
    centre: torch.Tensor
    constant: torch.Tensor | None

    def groups(self, reader_rate: float, rate: float) -> list[dict[str, Any]]:
        """What the optimizer takes: the readers, and the rest."""
        rest = [self.writers] if self.constant is None else [self.writers, self.constant]
        return [
            {"params": [self.readers], "lr": reader_rate, "full_rate": reader_rate},
            {"params": rest, "lr": rate, "full_rate": rate},
        ]

    def added(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What the gate of the layer `layers[number]` adds to x, [..., width]."""
        kept = self.kept[number].repeat_interleave(len(self.readers[number]) // self.kept.shape[1])[:, None].to(x)
        read = x @ ((self.readers[number] * self.sizes[number]).to(x) * kept) - self.centre[number].to(x)
        written = read @ (self.writers[number].to(x) * kept).T
        return written if self.constant is None else written + self.constant[number].to(x) * kept[:, 0]

    @torch.no_grad()
    def keep(self, heads: int) -> None:
        """Go on with so many heads: those that change most of what the layers say."""
        self.kept.copy_(largest(self.shares(), heads))

    def shares(self) -> torch.Tensor:
        """How much of what is added goes with each head, as reader or as writer, [layers, num_heads].

        It is the mean square that is added to numbers of x of mean 0 and variance 1 that do not depend on one another,
        less that without the head.
        """
        deviations = self.deviations[..., None]
        read, written = map(self._products, (self.readers * self.sizes * deviations, self.writers / deviations))
        read_in_all, written_in_all = (products.sum(1, keepdim=True) for products in (read, written))
        found = (written * read_in_all + written_in_all * read - written * read).sum((2, 3))
        if self.constant is None:
            return found
        return found + self._products((self.constant / self.deviations)[..., None])[..., 0, 0]

    def _products(self, part: torch.Tensor) -> torch.Tensor:
        """The products of the columns with one another, by head: of [layers, width, r], [layers, num_heads, r, r]."""
        heads = part.unflatten(1, (self.kept.shape[1], -1))
        return torch.einsum("lhdr,lhds->lhrs", heads, heads)

    @contextlib.contextmanager
    def acting(self, chosen: Sequence[Site]) -> Iterator[None]:
        """Let it act in a model, whose sites of these layers are given."""
        with contextlib.ExitStack() as hooks:
            for number, site in enumerate(chosen):

                def shift(_module: nn.Module, args: tuple[torch.Tensor, ...], number: int = number) -> tuple[Any, ...]:
                    x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
                    return ((x + self.added(number, x)).to(args[0].dtype), *args[1:])

                hooks.callback(site.outer.register_forward_pre_hook(shift).remove)
            yield

    @torch.no_grad()
    def trained(self) -> TrainedGate:
        """What was learned: V itself, and the constant without the centre that the gate had."""
        constant = self.constant
        if constant is not None:
            constant = constant - (self.writers @ self.centre[..., None])[..., 0]
        return TrainedGate(self.layers, self.readers * self.sizes, self.writers.clone(), constant, self.kept)


def initial_weights(probe: HarmProbe, how: GateSettings, num_heads: int) -> GateWeights:
    """What the training starts with."""
    layers = probe.layers() if how.layers is None else how.layers
    chosen = list(layers)
    width = probe.harmful.shape[2]
    noise = torch.randn(len(chosen), width, how.rank, generator=torch.Generator().manual_seed(how.seed), device="cpu")
    readers = noise / probe.spread[chosen, None, None].clamp_min(1e-20) / width**0.5  # Vᵀ x is of about one
    readers[:, :, 0] = probe.directions(blind=not how.constant)[chosen]
    sizes = readers.square().mean(1, keepdim=True).sqrt().clamp_min(1e-20)
    centre = torch.einsum("lw,lwr->lr", probe.centre[chosen], readers)
    writers = torch.zeros(len(chosen), width, how.rank, device="cpu", requires_grad=True)
    return GateWeights(
        layers,
        probe.deviations[chosen].maximum(probe.spread[chosen, None] / 10).clamp_min(1e-20),
        torch.ones(len(chosen), num_heads, dtype=torch.bool, device="cpu"),
        (readers / sizes).requires_grad_(),
        sizes,
        writers,
        centre if how.constant else torch.zeros_like(centre),
        torch.zeros(len(chosen), width, device="cpu", requires_grad=True) if how.constant else None,
    )
