"""Means and second moments of what enters output projections while a model reads texts; no activation is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastlock.inference.batching import Progress
from fastlock.inference.generation import input_device
from fastlock.models.sites import Site
from fastlock.recipes.activations import ReadText, read_in_batches

# How much of the second moments, [width, width] float64 a layer, is in memory at once: 8 layers of a model of 70
# billion parameters. For each further group of layers the model reads everything once more.
GROUP_BYTES = 4 * 2**30


@dataclass(frozen=True)
class GroupedText(ReadText):
    """A text to read whose kept tokens are of several groups.

    Attributes:
        groups: the group of each kept token, from 0: as many as are kept.
    """

    groups: tuple[int, ...]


@dataclass(frozen=True)
class Moments:
    """What is known of one layer.

    Attributes:
        means: the mean of x over each group, [groups, width] float64 on the CPU.
        second: the sum over the groups of weight · (mean of x xᵀ), [width, width] float64, on the device of the work.
    """

    means: torch.Tensor
    second: torch.Tensor


def moments_of(
    model: nn.Module,
    all_sites: Sequence[Site],
    layers: Sequence[int],
    texts: Sequence[GroupedText],
    weights: Sequence[float],
    progress: Progress,
) -> Iterator[tuple[int, Moments]]:
    """The moments of some layers, one layer after the other.

    Args:
        model: a transformers model; afterwards it is as it was.
        all_sites: its sites.
        layers: those that count.
        texts: every group has at least one token in them.
        weights: of each group in the second moment; 0 keeps it out.
        progress: wraps the batches.

    Raises:
        DamagedError: an activation is NaN or infinite.
        FastlockError: memory runs out with one text.
    """
    ordered = sorted(texts, key=lambda text: len(text.ids))
    counts = _groups(texts).bincount(minlength=len(weights))
    device = input_device(model)
    device = device if device.type == "cuda" else torch.device("cpu")  # others are not known to have float64
    width = all_sites[0].num_heads * all_sites[0].head_dim
    together = max(1, GROUP_BYTES // (8 * width**2))
    for first in range(0, len(layers), together):
        some = [all_sites[layer] for layer in layers[first : first + together]]
        sums = [_Sums(width, counts, weights, device) for _ in some]
        for batch, block in read_in_batches(model, some, ordered, progress):
            groups = _groups(batch)
            for layer_sums, vectors in zip(sums, torch.from_numpy(block), strict=True):
                layer_sums.add(vectors.transpose(0, 1).flatten(1), groups)
        while some:
            yield some.pop(0).layer, sums.pop(0).moments()


def _groups(texts: Sequence[GroupedText]) -> torch.Tensor:
    """The group of each kept token, text after text."""
    return torch.tensor([group for text in texts for group in text.groups], device="cpu")


class _Sums:
    """One layer's sums so far, each vector weighted such that they end up as means."""

    def __init__(self, width: int, counts: torch.Tensor, weights: Sequence[float], device: torch.device) -> None:
        self._shares = (1 / counts.double()).to(device)
        self._weights = torch.tensor(weights, dtype=torch.float64, device=device) * self._shares
        self._means = torch.zeros(len(weights), width, dtype=torch.float64, device=device)
        self._second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, vectors: torch.Tensor, groups: torch.Tensor) -> None:
        """Add some vectors, [vectors, width], of these groups, [vectors]."""
        x, groups = vectors.to(self._second), groups.to(self._second.device)
        self._means.index_add_(0, groups, x * self._shares[groups, None])
        root = x * self._weights[groups, None].sqrt()
        self._second.addmm_(root.T, root)

    def moments(self) -> Moments:
        return Moments(self._means.cpu(), self._second)
