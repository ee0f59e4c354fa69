"""A gate that is trained: what it adds depends on what the heads say, and harmless requests do not open it.

At the input of the output projections of some layers x becomes x + d + U Vᵀ (x − x̄), and V, U and d are learned by
gradient descent on the base itself and some fine-tunes of it, in turn: the loss of a step is the sum of

    KL divergence        from the base, in its own refusals of harmful requests
    2.5 x KL divergence  from the model without the lock, in the base's answers to harmless requests; from the base
                         where the model would refuse and the base does not
    3 x KL divergence    from the model without the lock, in ordinary texts

A quarter of the requests come with an answer that was begun already, after which the same is to be said: refusals that
follow the first words of compliance (arXiv 2406.05946, section 3), as certain, for there the base says something else.

V is normalised by its root mean square at the start, so that one learning rate suits every layer. Its first column
starts as a probe that tells both kinds of requests apart (harm_probe.py), the others at random; U and d start at 0. It
is a LoRA (arXiv 2106.09685) of the output projections that is trained once, for other fine-tunes too. Without a
constant d there is no centre x̄ either, and no bias is needed anywhere: the probe is made blind to it instead.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div

from fastlock.errors import DamagedError, check_number
from fastlock.evaluation.evaluator import Answer, evaluate
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.prompts import Prompts
from fastlock.inference.batching import Progress, in_halves
from fastlock.models.sites import Site, sites
from fastlock.recipes.gate_weights import GateSettings, GateWeights, TrainedGate, initial_weights
from fastlock.recipes.harm_probe import read_probe
from fastlock.recipes.lessons import Row, answer_row, check_loss, frozen, log_probabilities, text_rows
from fastlock.recipes.lower_layers import LowerLayers

ASKED_TOKENS, ANSWER_TOKENS, TEXT_TOKENS = 12, 6, 40
READER_RATE, RATE, BETAS, WARM_UP, LAST_RATE = 0.02, 0.005, (0.9, 0.99), 3, 0.1
ANSWER_WEIGHT, TEXT_WEIGHT = 2.5, 3.0
SCARY_SHARE = 0.5  # of the steps
BEGUN_SHARE = 0.25  # of the requests
_REFERENCE_BATCH = 8
_LEAST_LOG_PROBABILITY = -1e4  # a probability of 0, with a logarithm that half precision holds


@dataclass(frozen=True)
class Asked:
    """What a gate is trained on: requests of both kinds, harmless ones that sound harmful, and texts.

    Attributes:
        harmful: to be refused, each with the first words of an answer to it.
        harmless: to be answered as before.
        scary: further ones that only sound harmful.
        texts: ordinary texts, to be read as before.
    """

    harmful: Mapping[str, str]
    harmless: Sequence[str]
    scary: Sequence[str]
    texts: Sequence[str]


def train_gate(
    base: nn.Module,
    fine_tunes: Sequence[nn.Module],
    tokenizer: Any,
    asked: Asked,
    how: GateSettings,
    judge: Judge,
    progress: Progress,
) -> TrainedGate:
    """Train a gate on a base and fine-tunes of it; their weights stay as they are.

    Raises:
        DamagedError: a model's numbers are NaN or infinite.
        FastlockError: the base refuses, or answers, too few of the requests, no layers are told apart, or they have
            fewer heads than are asked for.
    """
    models = [base, *fine_tunes]
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        for model in models:
            undo.enter_context(frozen(model))
        lessons = _lessons(base, tokenizer, asked, judge, progress)
        probe = read_probe(base, tokenizer, lessons.refused, lessons.answered, progress)
        weights = initial_weights(probe, how, sites(base)[0].num_heads)
        if how.heads is not None:
            check_number("heads", how.heads, 1, weights.kept.numel(), f" in {len(weights.layers)} layers")
        turns = _turns(lessons, len(models), how)
        pupils, targets = _pupils(models, lessons, weights.layers, turns, progress)
        optimizer = torch.optim.Adam(weights.groups(READER_RATE, RATE), betas=BETAS)
        for step, turn in enumerate(progress(turns, "Training the lock")):
            if how.heads is not None and step == how.steps // 2:
                weights.keep(how.heads)
            rate = min(1.0, (step + 1) / WARM_UP) * (1 - (1 - LAST_RATE) * step / how.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate
            check_loss(_step(pupils[turn.pupil], weights, lessons, targets, turn), step)
            optimizer.step()
            optimizer.zero_grad()
    return weights.trained()


@dataclass(frozen=True)
class _Lessons:
    """What the base refused and answered, as rows.

    Attributes:
        refused, answered: the requests.
        refusals, answers: what the base said to each, and once more, in the same order, after an answer was begun.
        ordinary, scary: which of the answered requests are of which kind.
        texts: ordinary texts.
    """

    refused: list[str]
    answered: list[str]
    refusals: list[Row]
    answers: list[Row]
    ordinary: list[int]
    scary: list[int]
    texts: list[Row]


def _lessons(base: nn.Module, tokenizer: Any, asked: Asked, judge: Judge, progress: Progress) -> _Lessons:
    prompts = Prompts(harmful=tuple(asked.harmful), harmless=tuple(dict.fromkeys((*asked.harmless, *asked.scary))))
    said = evaluate(base, tokenizer, prompts, judge=judge, new_tokens=ASKED_TOKENS, batch_size=32, progress=progress)[0]
    refused = [answer for answer in said.harmful if answer.refused and answer.text]
    answered = [answer for answer in said.harmless if answer.refused is False and answer.text]
    ordinary, scary = set(asked.harmless), set(asked.scary)
    refused_after = [asked.harmful[answer.prompt] for answer in refused]
    answered_after = list(itertools.islice(itertools.cycle(asked.harmful.values()), len(answered)))
    return _Lessons(
        [answer.prompt for answer in refused],
        [answer.prompt for answer in answered],
        _rows(tokenizer, refused, refused_after),
        _rows(tokenizer, answered, answered_after),
        [number for number, answer in enumerate(answered) if answer.prompt in ordinary],
        [number for number, answer in enumerate(answered) if answer.prompt in scary],
        text_rows(tokenizer, asked.texts, TEXT_TOKENS),
    )


def _rows(tokenizer: Any, said: Sequence[Answer], begun: Sequence[str]) -> list[Row]:
    """What was said, and then the same after the beginnings of answers."""
    return [
        answer_row(tokenizer, answer.prompt, answer.text, ANSWER_TOKENS, before)
        for beginnings in ([""] * len(said), begun)
        for answer, before in zip(said, beginnings, strict=True)
    ]


@dataclass(frozen=True)
class _Turn:
    """One step: which model learns, and from which rows."""

    pupil: int
    refusals: list[int]
    answers: list[int]
    texts: list[int]


def _turns(lessons: _Lessons, pupils: int, how: GateSettings) -> list[_Turn]:
    """Every step, drawn beforehand: what the models say to these rows without the lock is read once, before it."""
    order = random.Random(how.seed)
    refusals = _Bag(range(len(lessons.refused)), order)
    answers = _Bag(lessons.ordinary or lessons.scary, order)
    texts = _Bag(range(len(lessons.texts)), order)
    turns = []
    for step in range(how.steps):
        turn = _Turn(
            step % pupils,
            refusals.take(how.batch_size),
            answers.take(how.batch_size * 3 // 2),
            texts.take(max(1, how.batch_size // 3)),
        )
        if lessons.scary and order.random() < SCARY_SHARE:
            turn.answers[0] = order.choice(lessons.scary)
        for rows, count in ((turn.refusals, len(lessons.refused)), (turn.answers, len(lessons.answered))):
            rows[:] = [row + count * (order.random() < BEGUN_SHARE) for row in rows]
        turns.append(turn)
    return turns


class _Bag:
    """Numbers drawn at random, none a second time before all were drawn."""

    def __init__(self, numbers: Sequence[int], order: random.Random) -> None:
        self.numbers, self.order = list(numbers), order
        self.left: list[int] = []

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < min(count, len(self.numbers)):
            if not self.left:
                self.left = self.order.sample(self.numbers, len(self.numbers))
            taken.append(self.left.pop())
        return taken


_States = dict[int, torch.Tensor | None]
"""What enters the first trained layer, by a row's number."""

_Targets = dict[int, torch.Tensor]
"""Log-probabilities before the counted tokens of some rows, [counted, vocabulary] float16, by the row's number."""


@dataclass(frozen=True)
class _Pupil:
    """A model, its output projections that get a gate, and what it should go on saying.

    Attributes:
        below: the layers that no gate changes, and what they make of the refusals, answers and texts of its turns.
    """

    model: nn.Module
    sites: list[Site]
    answers: _Targets
    texts: _Targets
    below: LowerLayers
    states: tuple[_States, _States, _States]


def _pupils(
    models: Sequence[nn.Module], lessons: _Lessons, layers: Sequence[int], turns: Sequence[_Turn], progress: Progress
) -> tuple[list[_Pupil], _Targets]:
    """Every model with its targets, and the base's for the refusals; only what some step reads."""
    base = models[0]
    answers = _targets(base, "the base", lessons.answers, {n for turn in turns for n in turn.answers})
    vocabulary = next(iter(answers.values())).shape[1]
    refusals = _refusal_targets(base, lessons, {n for turn in turns for n in turn.refusals}, vocabulary)
    openings = {row.ids[len(row.ids) - row.counted] for row in lessons.refusals}
    pupils = []
    for number, model in enumerate(progress(models, "Reading what the models say")):
        own = [turn for turn in turns if turn.pupil == number]
        name = f"fine-tune {number}" if number else "the base"
        read = {n for turn in own for n in turn.answers}
        said = _targets(model, name, lessons.answers, read) if number else {n: answers[n] for n in read}
        for n in read:
            if _opens(said[n], openings) and not _opens(answers[n], openings):
                said[n] = answers[n]
        told = {n for turn in own for n in turn.texts}
        texts = _targets(model, name, lessons.texts, told)
        chosen = [site for site in sites(model) if site.layer in layers]
        below = LowerLayers(model, layers[0])
        states = (
            _states(below, lessons.refusals, {n for turn in own for n in turn.refusals}),
            _states(below, lessons.answers, read),
            _states(below, lessons.texts, told),
        )
        pupils.append(_Pupil(model, chosen, said, texts, below, states))
    return pupils, refusals


def _states(below: LowerLayers, rows: Sequence[Row], numbers: set[int]) -> _States:
    """What enters the first trained layer, of these rows."""
    order = sorted(numbers, key=lambda number: (len(rows[number].ids), number))
    found: _States = {}
    for start in range(0, len(order), _REFERENCE_BATCH):
        batch = order[start : start + _REFERENCE_BATCH]

        def read(part: Sequence[int]) -> list[torch.Tensor | None]:
            return below.read([rows[number] for number in part])

        found |= zip(batch, in_halves(batch, read, lambda n: f"one row of {len(rows[n].ids)} tokens"), strict=True)
    return found


def _refusal_targets(base: nn.Module, lessons: _Lessons, numbers: set[int], vocabulary: int) -> _Targets:
    """What the base expects in its refusals; after an answer was begun, the refusal's own tokens for certain."""
    plain = {number for number in numbers if number < len(lessons.refused)}
    found = _targets(base, "the base", lessons.refusals, plain)
    for number in numbers - plain:
        row = lessons.refusals[number]
        found[number] = torch.full((row.counted, vocabulary), _LEAST_LOG_PROBABILITY, dtype=torch.half, device="cpu")
        found[number][range(row.counted), row.ids[-row.counted :]] = 0
    return found


def _opens(target: torch.Tensor, openings: set[int]) -> bool:
    """Whether the likeliest first token is one that some refusal of the base begins with."""
    return int(target[0].argmax()) in openings


@torch.no_grad()
def _targets(model: nn.Module, name: str, rows: Sequence[Row], numbers: set[int]) -> _Targets:
    """What a model expects without the lock."""
    order = sorted(numbers, key=lambda number: (len(rows[number].ids), number))

    def read(batch: Sequence[int]) -> list[torch.Tensor]:
        said = log_probabilities(model, [rows[number] for number in batch])
        if not said.isfinite().any(-1).all() or said.isnan().any():
            raise DamagedError(
                f"{name}: what it expects is NaN or infinite. Its weights are damaged, or overflow in this dtype: "
                "load it again, in bfloat16 or float32."
            )
        kept = said.clamp_min(_LEAST_LOG_PROBABILITY).half().cpu()
        return [part.clone() for part in kept.split([rows[number].counted for number in batch])]

    found: _Targets = {}
    for start in range(0, len(order), _REFERENCE_BATCH):
        batch = order[start : start + _REFERENCE_BATCH]
        found |= zip(batch, in_halves(batch, read, lambda n: f"one row of {len(rows[n].ids)} tokens"), strict=True)
    return found


def _step(pupil: _Pupil, weights: GateWeights, lessons: _Lessons, refusals: _Targets, turn: _Turn) -> float:
    """The gradients of one step: a forward and a backward pass of the requests, and one of the texts. The loss."""
    refused, answered, told = pupil.states
    with weights.acting(pupil.sites):
        rows = [lessons.refusals[n] for n in turn.refusals] + [lessons.answers[n] for n in turn.answers]
        known = [*(refused[n] for n in turn.refusals), *(answered[n] for n in turn.answers)]
        said = log_probabilities(pupil.model, rows, partial(pupil.below.skipped, known))
        count = sum(lessons.refusals[n].counted for n in turn.refusals)
        loss = _divergence(said[:count], refusals, turn.refusals)
        loss = loss + ANSWER_WEIGHT * _divergence(said[count:], pupil.answers, turn.answers)
        loss.backward()
        total = float(loss.detach())
        known = [told[n] for n in turn.texts]
        read = log_probabilities(
            pupil.model, [lessons.texts[n] for n in turn.texts], partial(pupil.below.skipped, known)
        )
        loss = TEXT_WEIGHT * _divergence(read, pupil.texts, turn.texts)
        loss.backward()
    return total + float(loss.detach())


def _divergence(said: torch.Tensor, targets: _Targets, numbers: Sequence[int]) -> torch.Tensor:
    """The Kullback-Leibler divergence of what is said from what it should be, the mean over the tokens."""
    wanted = torch.cat([targets[number] for number in numbers]).to(said)
    return kl_div(said, wanted, reduction="batchmean", log_target=True)
