"""The curve, by plain loops over pairs; where it rises; and what shuffled kinds give."""

import itertools
import math
import random

import pytest
import torch

from fastlock.errors import FastlockError
from fastlock.finetuning.angles import angle_curve, last_states, rising_range
from fastlock.finetuning.decoder_layers import decoder_layers
from fastlock.inference.batching import no_progress
from fastlock.locks.band_evidence import AngleCurve
from tests.helpers.families import CONFIGS, tiny_model

ROWS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [8], [20, 30, 40, 50]]


def angle(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / (math.hypot(*a) * math.hypot(*b))))))


def states_of(kinds: list[int], layers: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(kinds), layers, 5, generator=generator)
    for layer in range(layers):
        states[:, layer, 0] += layer * torch.tensor(kinds)
    return states


KINDS = [0, 1, 0, 2, 1, 1, 0, 2, 0, 1]


def test_the_curve_is_that_of_all_pairs() -> None:
    curve = angle_curve(states_of(KINDS), KINDS)
    for layer in range(3):
        rows = states_of(KINDS)[:, layer].double().tolist()
        kind = {number: [row for row, k in zip(rows, KINDS, strict=True) if k == number] for number in range(3)}

        def mean(pairs) -> float:
            angles = [angle(a, b) for a, b in pairs]
            return math.fsum(angles) / len(angles)

        assert curve.normal[layer] == pytest.approx(mean(itertools.combinations(kind[0], 2)), abs=1e-9)
        assert curve.malicious[layer] == pytest.approx(mean(itertools.combinations(kind[1], 2)), abs=1e-9)
        assert curve.mixed[layer] == pytest.approx(mean(itertools.product(kind[0], kind[1])), abs=1e-9)
        assert curve.borderline[layer] == pytest.approx(mean(itertools.product(kind[0], kind[2])), abs=1e-9)


def test_sampled_pairs_come_to_the_same_curve() -> None:
    """The paper's 500 random pairs, with angles averaged, estimate what all pairs give exactly."""
    kinds = [0] * 30 + [1] * 30 + [2]
    states, chosen = states_of(kinds), random.Random(1)
    curve = angle_curve(states, kinds)
    rows = states[:, 2].double().tolist()
    sampled = [angle(rows[chosen.randrange(30)], rows[30 + chosen.randrange(30)]) for _ in range(4000)]
    assert sum(sampled) / len(sampled) == pytest.approx(curve.mixed[2], abs=1.5)


def test_the_threshold_is_what_shuffled_kinds_give() -> None:
    """By a plain loop over shuffles of its own, of other random numbers."""
    kinds = [0] * 12 + [1] * 9 + [2]
    states = states_of(kinds, seed=4)
    rows = [states[:, layer].double().tolist() for layer in range(3)]
    between = [[[angle(a, b) for b in one] for a in one] for one in rows]
    chosen, largest = random.Random(8), []
    for _ in range(1500):
        order = chosen.sample(range(21), 21)
        normal, malicious = order[:12], order[12:]
        of_layers = []
        for one in between:
            within = [one[a][b] for a, b in itertools.combinations(normal, 2)]
            others = [one[a][b] for a, b in itertools.combinations(malicious, 2)]
            mixed = [one[a][b] for a, b in itertools.product(normal, malicious)]
            of_layers.append(sum(mixed) / len(mixed) - (sum(within) / len(within) + sum(others) / len(others)) / 2)
        largest.append(max(of_layers))
    below = sum(value <= angle_curve(states, kinds).threshold for value in largest) / len(largest)
    assert 0.975 <= below <= 0.999


def test_without_a_difference_nothing_rises() -> None:
    rose = 0
    for seed in range(20):
        kinds = [0] * 20 + [1] * 20 + [2]
        states = torch.randn(41, 6, 8, generator=torch.Generator().manual_seed(seed))
        rose += rising_range(angle_curve(states, kinds)) is not None
    assert rose <= 2


def curve_of(separation: list[float], threshold: float) -> AngleCurve:
    none = tuple(0.0 for _ in separation)
    return AngleCurve(none, none, tuple(separation), none, threshold)


@pytest.mark.parametrize(
    ("separation", "threshold", "expected"),
    [
        ([0, 0, 0, 5, 10, 15, 15.5, 15.6], 1.0, (3, 5)),  # until it first flattens
        ([0, 1, 2, 3, 4], 0.5, (1, 4)),  # it never does
        ([0, 10, 15, 20, 20], 1.0, (1, 3)),  # slower is not flat
        ([0, 0.4, 0.9, 20, 40, 41], 0.1, (3, 4)),  # what is small beside the rest has not risen
        ([5, 5, 5], 1.0, (0, 0)),
        ([0, 1, 2, 3], 3.0, None),
        ([-3, -2, -1], 0.1, None),
        ([0, 0, 9], 1.0, (2, 2)),
    ],
)
def test_where_it_rises(separation, threshold, expected) -> None:
    assert rising_range(curve_of(separation, threshold)) == expected


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_states_are_those_after_each_layer_at_the_last_position(kind) -> None:
    """Of every family, whatever its layers return, and whatever goes into a batch with a row."""
    model = tiny_model(kind, torch.float64).double()
    layers = decoder_layers(model).layers
    found = last_states(model, layers, ROWS, 3, no_progress)
    assert found.shape == (4, 3, 64)
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            hidden = model(torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states
        for layer in range(2):  # after the last layer, transformers gives what the final norm makes of it
            assert torch.allclose(found[number, layer].double(), hidden[layer + 1][0, -1], atol=1e-5), layer


def test_states_that_are_no_numbers_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FastlockError, match="prompt 1: the hidden state after layer 1 is zero or not finite"):
        last_states(model, decoder_layers(model).layers, ROWS, 4, no_progress)


def test_reading_leaves_no_hooks_and_no_modes() -> None:
    model = tiny_model("llama")
    model.train()
    last_states(model, decoder_layers(model).layers, ROWS, 4, no_progress)
    assert model.training
    assert all(not layer._forward_hooks for layer in model.model.layers)
