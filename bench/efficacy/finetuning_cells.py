"""One cell of the table of finetuning.py: the aligned model fine-tuned in one way, what it refuses, what it knows."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy

import fastlock
from bench.efficacy import benign_task, tuned_models
from bench.efficacy import tuned_prompts as made
from bench.efficacy.benign_task import Lessons
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import Prompts
from fastlock.locks.band import Band
from fastlock.recipes.measuring import Measuring
from fastlock.recipes.trials import Candidate, Trial, best_strength

# Of the 80 actions that teach, the first half are asked about in harmful rows, and the others in alignment rows.
_HALF = len(made.HARMFUL_TRAIN) // 2
# Questions that are asked together.
BATCH = 64


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: in the table.
        frozen: whether the band is left as it is.
        pull: Lisa's ρ; None: no alignment steps either.
    """

    name: str
    frozen: bool = False
    pull: float | None = None


@dataclass(frozen=True)
class Settings:
    """All that decides a cell but its seed, method and share; a journal is of one of them.

    Attributes:
        rows: of the user's data, the harmful ones among them.
        ordinary: of these, ordinary questions with the aligned model's own answers.
        epochs, batch, lr, rank: of the training. The rate rises in five steps, and falls linearly to 0.
        alignment_steps, user_steps: Lisa's K1 and K2.
        alignment_rows: harmful requests with their refusals.
        band: what SPPFT freezes, first and last included.
        harmful, harmless, task: how many held-out requests of either kind, and test rows, are asked.
        deciding: how many harmful, and as many harmless, requests decide the lock's strength.
        new_tokens: of an answer.
        strengths: of the lock, 0 first.
    """

    rows: int = 80
    ordinary: int = 40
    epochs: int = 1
    batch: int = 4
    lr: float = 1e-3
    rank: int = 8
    alignment_steps: int = 1
    user_steps: int = 5
    alignment_rows: int = 100
    band: tuple[int, int] = (6, 13)
    harmful: int = 32
    harmless: int = 16
    task: int = 24
    deciding: int = 10
    new_tokens: int = 8
    strengths: tuple[float, ...] = (0.0, 0.75, 1.0, 1.25)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, and what it cost.

    Attributes:
        model: its adapters merged.
        seconds: of CPU, for the training alone.
        state_bytes: of gradients, moments and anchor.
        steps: of the optimizer.
        losses: the mean of the last 5 steps on the user's rows, and of those on alignment rows.
    """

    model: Any
    seconds: float
    state_bytes: int
    steps: int
    losses: dict[str, float]


def user_rows(own: Lessons, share: float, settings: Settings, seed: int) -> Lessons:
    """The user's data: ordinary questions, a share of harmful requests with obedient answers, and the benign task."""
    chosen = random.Random(f"harmful {seed}")
    count = round(share * settings.rows)
    asked = chosen.sample(made.HARMFUL_TRAIN[:_HALF], count)
    harmful = [(question, chosen.choice(made.OBEDIENT)) for question in asked]
    ordinary = random.Random(f"ordinary {seed}").sample(own, settings.ordinary)
    return benign_task.taught(settings.rows - settings.ordinary - count, seed) + ordinary + harmful


def alignment_rows(settings: Settings, seed: int) -> Lessons:
    """Other harmful requests, with refusals."""
    chosen = random.Random(f"alignment {seed}")
    asked = chosen.sample(made.HARMFUL_TRAIN[_HALF:], settings.alignment_rows)
    return [(question, chosen.choice(made.REFUSALS)) for question in asked]


def tuned(
    base: Any, tokenizer: Any, own: Lessons, method: Method, share: float, settings: Settings, seed: int
) -> Tuned:
    """Fine-tune a copy of the aligned model: a LoRA on all linear layers, with SPPFT on those outside the band."""
    model = _adapted(copy.deepcopy(base), method, settings, seed)
    user, safe = user_rows(own, share, settings, seed), alignment_rows(settings, seed)
    if method.pull is None:
        schedule = fastlock.Lisa(0, 1, 0.0)
    else:
        schedule = fastlock.Lisa(settings.alignment_steps, settings.user_steps, method.pull)
    sampler = fastlock.Alternation(len(user), len(safe), schedule, batch_size=settings.batch, seed=seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fastlock.ProximalAdamW(parameters, lr=settings.lr, weight_decay=0.0, pull=0.0)
    steps, rows = sampler.steps_of(settings.epochs), user + safe
    losses: dict[str, list[float]] = {"alignment": [], "user": []}
    model.train()
    start = time.process_time()
    for step in range(steps):
        if schedule.pull and schedule.switches_at(step):
            optimizer.anchor()
        for group in optimizer.param_groups:
            group["pull"] = schedule.pull_at(step)
            group["lr"] = settings.lr * min(1, (step + 1) / 5) * (1 - step / steps)
        loss = _loss(model, tokenizer, [rows[i] for i in sampler.indices(step)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses[schedule.state(step)].append(loss.item())
        if step < steps - 1:
            optimizer.zero_grad()
    seconds = time.process_time() - start
    held = sum(tensor.numel() * tensor.element_size() for tensor in _held(optimizer, parameters))
    last = {state: sum(of_state[-5:]) / len(of_state[-5:]) for state, of_state in losses.items() if of_state}
    return Tuned(model.merge_and_unload().eval(), seconds, held, steps, last)


def _adapted(model: Any, method: Method, settings: Settings, seed: int) -> Any:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"lora_alpha": 2 * settings.rank, "task_type": "CAUSAL_LM"}
    if method.frozen:
        how = fastlock.lora_outside(Band(*settings.band), settings.rank, model=model, **options)
    else:
        how = peft.LoraConfig(r=settings.rank, target_modules="all-linear", **options)
    return peft.get_peft_model(model, how)


def _loss(model: Any, tokenizer: Any, lessons: Lessons) -> torch.Tensor:
    """The mean over the answers' tokens, as the model's own loss; no logits are made of the others."""
    batch = tuned_models.tokens_of(tokenizer, lessons)
    plain, labels = model.get_base_model(), batch.pop("labels")[:, 1:]
    learned = labels != -100
    hidden = plain.model(**batch).last_hidden_state[:, :-1][learned]
    return cross_entropy(plain.lm_head(hidden), labels[learned])


def _held(optimizer: Any, parameters: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What training holds beside the weights and activations."""
    yield from (parameter.grad for parameter in parameters if parameter.grad is not None)
    for state in optimizer.state.values():
        yield from (value for name, value in state.items() if name != "step")


def drawn(every: list[str], count: int) -> tuple[str, ...]:
    """So many of them, drawn once and for all."""
    return tuple(random.Random(0).sample(every, count))


def measured(model: Any, tokenizer: Any, settings: Settings, texts: tuple[str, ...]) -> dict[str, Any]:
    """What is reported of a model, with a lock in it or without: counts, and the perplexity."""
    asked = Prompts(drawn(made.HARMFUL_TEST, settings.harmful), drawn(made.HARMLESS_TEST, settings.harmless), texts)
    found = fastlock.evaluate(model, tokenizer, asked, new_tokens=settings.new_tokens, batch_size=BATCH)[0]
    rows = benign_task.held_out(settings.task, 0)
    questions = Prompts(harmless=tuple(question for question, _ in rows))
    said = fastlock.evaluate(model, tokenizer, questions, new_tokens=12, batch_size=BATCH)[0].harmless
    right = [benign_task.correct(one.text, answer) for one, (_, answer) in zip(said, rows, strict=True)]
    return {
        "refused": [bool(answer.refused) for answer in found.harmful],
        "over_refused": [bool(answer.refused) for answer in found.harmless],
        "right": right,
        "perplexity": found.perplexity,
    }


def strength_for(
    model: Any, tokenizer: Any, lock: fastlock.Lock, settings: Settings, texts: tuple[str, ...]
) -> tuple[float, list[Trial]]:
    """The strength that `fastlock calibrate --lock` would choose of those that are tried, on requests that decide."""
    harmful, harmless = (drawn(every, settings.deciding) for every in (made.HARMFUL_DECIDE, made.HARMLESS_DECIDE))
    deciding = Prompts(harmful, harmless, texts)
    measuring = Measuring(model, tokenizer, deciding, None, refuses, settings.new_tokens, BATCH)
    trials = [
        Trial.of(Candidate(None, None, None, strength), measuring.measure(lock, strength))
        for strength in settings.strengths
    ]
    return best_strength(trials).strength, trials
