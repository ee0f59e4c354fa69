"""The paper's angular gap: how far apart, after each layer, malicious and normal requests lie (arXiv 2408.17003, 3.2).

One forward pass a request gives its hidden state after each layer at its last position; all pairs of requests are then
taken, not a sample of them. The paper's code takes the angle of the mean cosine; here angles are averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.inference.batching import Progress, Row, in_batches
from fastlock.inference.generation import evaluating, input_device
from fastlock.locks.band_evidence import AngleCurve

SHUFFLES = 999
# Of the shuffles' largest separations, so many lie below the threshold.
_BELOW = 0.99
# The curve has risen where it exceeds the first share of its largest value; it is flat where it rises by less than the
# second share of its mean rise so far. The paper reads both off a plot.
_RISEN, _FLAT = 0.1, 0.25


def last_states(
    model: Any, layers: Sequence[nn.Module], rows: Sequence[Row], batch_size: int, progress: Progress
) -> torch.Tensor:
    """The hidden state of each row's last position after each layer, [rows, layers, hidden] float32, on the CPU.

    Args:
        model: a transformers model.
        layers: its decoder's.
        rows: tokens, of any lengths; they are padded on the right, where no token sees it.
        batch_size: how many rows go together; halved as often as memory runs out.
        progress: what shows how far it is.

    Raises:
        FastlockError: a state is not finite, or memory runs out with a single row.
    """

    def work(batch: Sequence[Row]) -> list[torch.Tensor]:
        width, device = max(map(len, batch)), input_device(model)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
        with _reading(layers, [len(row) - 1 for row in batch]) as states:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        return list(torch.stack(states, dim=1))

    with evaluating(model):
        found = torch.stack(in_batches(rows, work, batch_size, progress, "Reading hidden states"))
    lengths = found.double().norm(dim=2)
    if not (lengths.isfinite() & (lengths > 0)).all():
        row, layer = (~(lengths.isfinite() & (lengths > 0))).nonzero()[0].tolist()
        raise FastlockError(
            f"prompt {row + 1}: the hidden state after layer {layer} is zero or not finite. Load the model in bfloat16 "
            "or float32, or check its weights."
        )
    return found


def angle_curve(states: torch.Tensor, kinds: Sequence[int], seed: int = 42) -> AngleCurve:
    """Mean angles in degrees after each layer, over all pairs of two different requests.

    Args:
        states: [requests, layers, hidden].
        kinds: of each request: 0 normal, 1 malicious, 2 borderline.
        seed: of the shuffles for the threshold, which change who is normal and who malicious.
    """
    of_kind = torch.tensor(kinds)
    normal, malicious, borderline = ((of_kind == kind).nonzero().flatten() for kind in range(3))
    both = torch.cat([normal, malicious])
    shuffled = _shuffled(len(normal), len(both), seed)
    within_normal, within_malicious, mixed, with_borderline = ([0.0] * states.shape[1] for _ in range(4))
    largest = torch.full((SHUFFLES,), -torch.inf, dtype=torch.float64)
    for layer in range(states.shape[1]):
        between = _angles(states[:, layer])
        within_normal[layer] = _mean_within(between, normal)
        within_malicious[layer] = _mean_within(between, malicious)
        mixed[layer] = float(between[normal][:, malicious].mean())
        with_borderline[layer] = float(between[normal][:, borderline].mean())
        largest = torch.maximum(largest, _separations(between[both][:, both], shuffled))
    threshold = float(largest.sort().values[round(_BELOW * (SHUFFLES + 1)) - 1])
    return AngleCurve(tuple(within_normal), tuple(within_malicious), tuple(mixed), tuple(with_borderline), threshold)


def rising_range(curve: AngleCurve) -> tuple[int, int] | None:
    """Where malicious and normal part, until that first flattens (the paper reads it off a plot); None if never.

    They part at the first layer whose separation exceeds the threshold and a tenth of its largest value. It is flat
    where the next layer adds less than a quarter of what the layers from there on added on average.
    """
    gap = curve.separation
    least = max(curve.threshold, _RISEN * max(gap))
    first = next((layer for layer, value in enumerate(gap) if value > least), None)
    if first is None:
        return None
    before = gap[first - 1] if first else 0.0
    for last in range(first, len(gap) - 1):
        mean_rise = (gap[last] - before) / (last - first + 1)
        if gap[last + 1] - gap[last] < _FLAT * mean_rise:
            return first, last
    return first, len(gap) - 1


@contextlib.contextmanager
def _reading(layers: Sequence[nn.Module], positions: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """The outputs of layers at one position of each row, [rows, hidden] float32, in the order of the layers."""
    states: list[torch.Tensor] = [torch.empty(0)] * len(layers)

    def hook(number: int, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        states[number] = hidden[torch.arange(len(positions)), list(positions)].detach().float().cpu()

    with contextlib.ExitStack() as undo:
        for number, layer in enumerate(layers):
            handle = layer.register_forward_hook(lambda _module, _inputs, output, number=number: hook(number, output))
            undo.callback(handle.remove)
        yield states


def _angles(states: torch.Tensor) -> torch.Tensor:
    """The angle between any two of some vectors [n, hidden], in degrees: [n, n] float64, with zeros on the diagonal."""
    unit = nn.functional.normalize(states.double(), dim=1)
    angles = (unit @ unit.T).clamp(-1, 1).arccos().rad2deg()
    return angles.fill_diagonal_(0)


def _mean_within(angles: torch.Tensor, chosen: torch.Tensor) -> float:
    count = len(chosen)
    return float(angles[chosen][:, chosen].sum() / (count * (count - 1)))


def _shuffled(normal: int, both: int, seed: int) -> torch.Tensor:
    """Who is normal in each shuffle: [SHUFFLES, both] float64 of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(SHUFFLES, both, dtype=torch.float64)
    for one in chosen:
        one[torch.randperm(both, generator=generator)[:normal]] = 1
    return chosen


def _separations(angles: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """The separation in each shuffle, [shuffles]: mixed pairs less the mean of both kinds' own."""
    count, others = normal[0].sum(), (1 - normal[0]).sum()
    reached = normal @ angles
    of_others = (1 - normal) @ angles
    within = (reached * normal).sum(dim=1) / (count * (count - 1))
    within_others = (of_others * (1 - normal)).sum(dim=1) / (others * (others - 1))
    mixed = (reached * (1 - normal)).sum(dim=1) / (count * others)
    return mixed - (within + within_others) / 2
