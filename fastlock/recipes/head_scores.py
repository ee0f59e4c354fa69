"""The score, the direction and the scale of every head, from its activations; a group of heads at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastlock.inference.batching import Progress, in_halves
from fastlock.recipes.activations import Activations
from fastlock.recipes.probes import accuracies

# How much of the activations is in memory at once, as float64, beside some copies of it; at least one head.
GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the activations say about every head.

    Attributes:
        scores: how well each head tells the two kinds apart, [num_layers, num_heads] float64; 0 without a direction.
        directions: the difference of the two means, normalised, [num_layers, num_heads, head_dim] float64; zeros where
            the means are the same.
        scales: standard deviation of the vectors along the direction, [num_layers, num_heads] float64.
    """

    scores: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    scales: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scoring:
    """How heads are scored.

    Attributes:
        name: what a lock's metadata calls it.
        splits: whether some vectors train and the others validate; without a split, the seed decides nothing.
        scores: given x, [heads, vectors, head_dim] float64, its projections on the directions, [heads, vectors], which
            vectors are of the kind that the direction leads to, and which train, both [vectors] bool: the scores,
            [heads] float64.
    """

    name: str
    splits: bool
    scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _accuracies(x: torch.Tensor, _along: torch.Tensor, safe: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """The paper's scores: the mean of train and validation accuracy of a logistic regression on each head."""
    return accuracies(x, safe, train)


def _effect_sizes(_x: torch.Tensor, along: torch.Tensor, safe: torch.Tensor, _train: torch.Tensor) -> torch.Tensor:
    """Cohen's d of both kinds along the direction; 0 where neither kind varies."""
    a, b = along[:, safe], along[:, ~safe]
    spread = ((a.var(dim=1, correction=0) + b.var(dim=1, correction=0)) / 2).sqrt()
    return torch.where(spread > 0, (a.mean(dim=1) - b.mean(dim=1)) / spread, 0)


REGRESSION = Scoring("logistic regression", splits=True, scores=_accuracies)
EFFECT_SIZE = Scoring("effect size", splits=False, scores=_effect_sizes)


def statistics(
    activations: Activations,
    safe: npt.NDArray[np.bool_],
    train: npt.NDArray[np.bool_],
    scoring: Scoring,
    device: torch.device,
    progress: Progress,
) -> Statistics:
    """The statistics of all heads, in float64.

    Args:
        activations: of all texts.
        safe: whether each vector is of the kind that the direction leads to, [vectors].
        train: whether each vector trains, if the scoring splits them, [vectors].
        scoring: how heads are scored.
        device: where to compute.
        progress: wraps the layers.

    Raises:
        FastlockError: memory runs out with one head.
    """
    # MPS has no float64, and other devices are not known to have it.
    device = device if device.type == "cuda" else torch.device("cpu")
    masks = torch.from_numpy(safe).to(device), torch.from_numpy(train).to(device)
    layers = progress(range(activations.shape[0]), "Scoring heads")
    parts = [_layer_statistics(activations, layer, *masks, scoring) for layer in layers]
    scores, directions, scales = (
        np.stack([layer.cpu().numpy() for layer in layers]) for layers in zip(*parts, strict=True)
    )
    return Statistics(scores, directions, scales)


def _layer_statistics(
    activations: Activations, layer: int, safe: torch.Tensor, train: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, ...]:
    """Scores, [num_heads], directions, [num_heads, head_dim], and scales, [num_heads], of one layer."""
    _, num_heads, vectors, head_dim = activations.shape
    together = max(1, GROUP_BYTES // (8 * vectors * head_dim))

    def work(heads: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        x = torch.from_numpy(activations.read(layer, slice(heads[0], heads[-1] + 1)))
        return [head_statistics(x.to(safe.device, torch.float64), safe, train, scoring)]

    def name(head: int) -> str:
        return f"the {vectors} vectors of layer {layer}, head {head}"

    groups = [range(first, min(first + together, num_heads)) for first in range(0, num_heads, together)]
    parts = [part for group in groups for part in in_halves(group, work, name)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def largest(sizes: torch.Tensor, heads: int) -> torch.Tensor:
    """The heads with the largest of these sizes, [num_layers, num_heads]: true for so many, false for the others."""
    kept = torch.zeros(sizes.numel(), dtype=torch.bool, device="cpu")
    kept[sizes.flatten().argsort(descending=True, stable=True)[:heads]] = True
    return kept.view(sizes.shape)


def head_statistics(
    x: torch.Tensor, safe: torch.Tensor, train: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, ...]:
    """Scores, [heads], directions, [heads, head_dim], and scales, [heads], of x, [heads, vectors, head_dim] float64."""
    difference = x[:, safe].mean(dim=1) - x[:, ~safe].mean(dim=1)
    norm = difference.norm(dim=1, keepdim=True)
    directions = torch.where(norm > 0, difference / norm, 0)
    along = (x @ directions[..., None])[..., 0]  # [heads, vectors]
    scores = scoring.scores(x, along, safe, train)
    return torch.where(norm[:, 0] > 0, scores, 0), directions, along.std(dim=1, correction=0)
