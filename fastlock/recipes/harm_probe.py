"""Where a base tells harmful requests from harmless ones: a linear probe of each layer at the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.inference.batching import Progress
from fastlock.inference.chat import prompt_tokens
from fastlock.models.sites import sites
from fastlock.recipes.activations import ReadText, activations_of

T = TypeVar("T")

# So many requests of a kind are read, spread over all of them; with fewer than LEAST nothing can be held out.
MOST, LEAST = 130, 4
# How far apart both kinds are along the probe, in standard deviations, where the layers tell them apart: on average.
TOLD_APART = 1.5
_SHRINKAGE = 0.1  # of each variance, to their mean: few requests would make some of them too small


@dataclass(frozen=True)
class HarmProbe:
    """The inputs of every output projection of a base at the ends of its prompts, [layers, requests, width] float32."""

    harmful: torch.Tensor
    harmless: torch.Tensor

    @property
    def centre(self) -> torch.Tensor:
        """The mean over the harmless requests: [layers, width]."""
        return self.harmless.mean(1)

    @property
    def deviations(self) -> torch.Tensor:
        """The standard deviations over all requests: [layers, width]."""
        return torch.cat([self.harmful, self.harmless], 1).std(1)

    @property
    def spread(self) -> torch.Tensor:
        """Their mean over a layer's numbers: [layers]."""
        return self.deviations.mean(1)

    def directions(self, blind: bool = False) -> torch.Tensor:
        """What x is multiplied with to tell both kinds apart, by linear discriminant analysis with diagonal covariance.

        Args:
            blind: whether they do not see the centre: then the product is 0 for the mean harmless request itself, and
                not only after the centre is taken away.

        Returns:
            [layers, width]; between the two means the product differs by 1.
        """
        return _directions(self.harmful, self.harmless, blind)

    def effects(self) -> torch.Tensor:
        """Cohen's d of each layer, [layers]: how far apart both kinds are along a direction that other requests gave.

        The requests are halved; each half is measured along the direction of the other.
        """
        halves = [(self.harmful[:, start::2], self.harmless[:, start::2]) for start in (0, 1)]
        return (_effects(*halves[0], _directions(*halves[1])) + _effects(*halves[1], _directions(*halves[0]))) / 2

    def layers(self) -> tuple[int, ...]:
        """The layers from the one on where the effects step up; all of them where they do not.

        A step function is fitted to the effects by least squares, so that one layer that falls short decides nothing.

        Raises:
            FastlockError: the mean effect in these layers is small.
        """
        effects = self.effects().double()
        errors = [float(_scatter(effects[:first]) + _scatter(effects[first:])) for first in range(len(effects))]
        first = errors.index(min(errors))
        if first and effects[first:].mean() < effects[:first].mean():
            first = 0
        if (above := float(effects[first:].mean())) < TOLD_APART:
            raise FastlockError(
                f"layers: the base's layers do not tell harmful requests from harmless ones (Cohen's d {above:.1f} "
                f"from layer {first} on). Give more requests of both kinds, or say which layers are to have a gate."
            )
        return tuple(range(first, len(effects)))


def read_probe(
    base: nn.Module, tokenizer: Any, harmful: Sequence[str], harmless: Sequence[str], progress: Progress
) -> HarmProbe:
    """Read requests with a base.

    Args:
        base: the aligned base, in eval mode.
        tokenizer: its tokenizer.
        harmful: requests that it refuses.
        harmless: requests that it answers.
        progress: wraps the batches.

    Raises:
        DamagedError: an activation is NaN or infinite.
        FastlockError: there are too few requests of a kind.
    """
    chosen = [spread(requests) for requests in (harmful, harmless)]
    for requests, what in zip(chosen, ("refuses", "answers"), strict=True):
        if len(requests) < LEAST:
            kind = "harmful" if what == "refuses" else "harmless"
            raise FastlockError(
                f"the base {what} {len(requests)} of the {kind} requests, and a gate learns from at least {LEAST}. "
                "Give more of them, or the base that is aligned."
            )
    texts = [
        ReadText(prompt_tokens(tokenizer, request)[0], 1, repr(request[:40])) for some in chosen for request in some
    ]
    order = sorted(range(len(texts)), key=lambda number: len(texts[number].ids))
    with activations_of(base, sites(base), [texts[number] for number in order], progress) as activations:
        read = torch.from_numpy(activations.read(slice(None), slice(None)))
    layers, _, vectors, _ = read.shape
    x = torch.empty(layers, vectors, read.shape[1] * read.shape[3], device="cpu")
    x[:, order] = read.transpose(1, 2).flatten(2)
    return HarmProbe(x[:, : len(chosen[0])], x[:, len(chosen[0]) :])


def spread(requests: Sequence[T]) -> list[T]:
    """At most MOST of them, at equal distances."""
    count = min(len(requests), MOST)
    return [requests[number * len(requests) // count] for number in range(count)]


def _directions(harmful: torch.Tensor, harmless: torch.Tensor, blind: bool = False) -> torch.Tensor:
    apart, centre = harmful.mean(1) - harmless.mean(1), harmless.mean(1)
    variance = (harmful.var(1) + harmless.var(1)) / 2
    tiny = torch.finfo(variance.dtype).tiny
    weights = 1 / (variance + _SHRINKAGE * variance.mean(1, keepdim=True)).clamp_min(tiny)
    w = weights * apart
    if blind:  # the best direction among those orthogonal to the centre
        towards = weights * centre
        share = (w * centre).sum(1) / (towards * centre).sum(1).clamp_min(tiny)
        w = w - share[:, None] * towards
    return w / (w * apart).sum(1, keepdim=True).clamp_min(tiny)


def _scatter(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of squared distances from their mean; 0 of none."""
    return (numbers - numbers.mean()).square().sum() if len(numbers) else numbers.new_zeros(())


def _effects(harmful: torch.Tensor, harmless: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    along = [(x * w[:, None]).sum(2) for x in (harmful, harmless)]
    deviation = ((along[0].var(1) + along[1].var(1)) / 2).sqrt()
    return (along[0].mean(1) - along[1].mean(1)) / deviation.clamp_min(torch.finfo(w.dtype).tiny)
