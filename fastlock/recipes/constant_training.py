"""A constant that is trained: one displacement of the heads that makes fine-tunes refuse as their aligned base does.

LoFiT (arXiv 2406.01563) learns offsets that are added to the outputs of attention heads, which is what the constant
part of a lock is. Here they are learned once, on a few fine-tunes of the base, by gradient descent on the sum of

    cross-entropy          of the base's own refusals of harmful requests
    2 x KL divergence      from the fine-tune without the lock, in its own answers to harmless requests
    3 x KL divergence      from the fine-tune without the lock, in ordinary texts

Nothing is read off the activations, and what the lock costs is part of what is minimised.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.errors import DamagedError
from fastlock.evaluation.evaluator import evaluate
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import Prompts
from fastlock.inference.batching import Progress
from fastlock.inference.generation import input_device
from fastlock.models.sites import Site, sites
from fastlock.models.unfolded import displaced
from fastlock.recipes.head_scores import largest
from fastlock.recipes.lessons import Row, answer_row, check_loss, frozen, text_rows
from fastlock.recipes.pairs import Pair

ANSWER_TOKENS, TEXT_TOKENS = 12, 48
RATE, WARM_UP, LAST_RATE = 0.005, 3, 0.1
OWN_WEIGHT, TEXT_WEIGHT = 2.0, 3.0
_IGNORED = -100


@dataclass(frozen=True)
class ConstantSettings:
    """How a constant is trained; the attributes are arguments of `train_lock`, all checked."""

    heads: int | None
    steps: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class _Lessons:
    """A fine-tune and its sites, with what it learns to refuse, and what it should still say."""

    model: nn.Module
    sites: Sequence[Site]
    refusals: Sequence[Row]
    own: Sequence[Row]
    texts: Sequence[Row]


def train_constant(
    base: nn.Module,
    fine_tunes: Sequence[nn.Module],
    tokenizer: Any,
    pairs: Sequence[Pair],
    harmless: Sequence[str],
    texts: Sequence[str],
    how: ConstantSettings,
    judge: Judge,
    progress: Progress,
) -> torch.Tensor:
    """Train a displacement on fine-tunes of a base; their weights stay as they are.

    Returns:
        d, [num_layers, num_heads, head_dim] float32; zero off the chosen heads.

    Raises:
        DamagedError: a fine-tune says nothing, or the loss becomes NaN or infinite.
        FastlockError: no text has two tokens.
    """
    lessons = list(_lessons(base, fine_tunes, tokenizer, pairs, harmless, texts, judge))
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        for model in fine_tunes:
            undo.enter_context(frozen(model))
        rounds = progress(range(how.steps), "Training the lock")
        return _displacement(lessons, rounds, how.steps, how.heads, how.batch_size, random.Random(how.seed))


def _displacement(
    lessons: Sequence[_Lessons],
    rounds: Iterable[int],
    steps: int,
    heads: int | None,
    batch_size: int,
    order: random.Random,
) -> torch.Tensor:
    """The trained displacement, [num_layers, num_heads, head_dim] float32; zero off the chosen heads."""
    site = lessons[0].sites[0]
    d = torch.zeros(len(lessons[0].sites), site.num_heads, site.head_dim, requires_grad=True)
    kept = torch.ones(*d.shape[:2], 1)
    optimizer = torch.optim.Adam([d], lr=RATE)
    for step in rounds:
        if heads is not None and step == steps // 2:
            kept = largest(d.detach().norm(dim=-1), heads)[..., None]
            optimizer = torch.optim.Adam([d], lr=RATE)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (1 - (1 - LAST_RATE) * step / steps)
        _step(lessons[step % len(lessons)], d, kept, batch_size, order, step)
        optimizer.step()
        optimizer.zero_grad()
    return d.detach() * kept


def _step(
    lesson: _Lessons, d: torch.Tensor, kept: torch.Tensor, batch_size: int, order: random.Random, step: int
) -> None:
    """The gradients of one step; each batch goes by itself, and only one is in memory."""
    total = 0.0
    batches = ((lesson.refusals, None), (lesson.own, OWN_WEIGHT), (lesson.texts, TEXT_WEIGHT))
    for rows, weight in batches:
        batch = order.sample(rows, min(batch_size, len(rows)))
        if weight is None:
            with _displaced(lesson.sites, d * kept):
                predicted, targets = _predictions(lesson.model, batch)
            loss = nn.functional.cross_entropy(predicted, targets)
        else:
            with torch.no_grad():
                before = _predictions(lesson.model, batch)[0].log_softmax(-1)
            with _displaced(lesson.sites, d * kept):
                after = _predictions(lesson.model, batch)[0].log_softmax(-1)
            loss = weight * nn.functional.kl_div(after, before, reduction="batchmean", log_target=True)
        loss.backward()
        total += float(loss.detach())
    check_loss(total, step)


def _predictions(model: nn.Module, batch: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits before each token that counts, [counted tokens, vocabulary] float32, and these tokens."""
    width, device = max(len(row.ids) for row in batch), input_device(model)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=device)
    targets = torch.full_like(ids, _IGNORED)
    for i, row in enumerate(batch):
        targets[i, len(row.ids) - row.counted : len(row.ids)] = torch.tensor(row.ids[-row.counted :])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = targets[:, 1:].to(logits.device)
    counted = targets != _IGNORED
    return logits[:, :-1][counted].float(), targets[counted]


def _displaced(all_sites: Sequence[Site], d: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Add the displacement d, [num_layers, num_heads, head_dim], to what enters the output projections."""
    return displaced((site, d[site.layer].flatten()) for site in all_sites)


def _lessons(
    base: nn.Module,
    models: Sequence[nn.Module],
    tokenizer: Any,
    pairs: Sequence[Pair],
    harmless: Sequence[str],
    texts: Sequence[str],
    judge: Judge = refuses,
) -> Iterator[_Lessons]:
    prompts = Prompts(harmful=tuple(pair.question for pair in pairs))
    answers = evaluate(base, tokenizer, prompts, judge=judge, new_tokens=ANSWER_TOKENS)[0].harmful
    refusals = [
        answer_row(tokenizer, pair.question, answer.text if answer.refused else pair.safe, ANSWER_TOKENS)
        for pair, answer in zip(pairs, answers, strict=True)
    ]
    rows = text_rows(tokenizer, texts, TEXT_TOKENS)
    for number, model in enumerate(models, 1):
        answers = evaluate(model, tokenizer, Prompts(harmless=tuple(harmless)), new_tokens=ANSWER_TOKENS)[0].harmless
        own = [answer_row(tokenizer, answer.prompt, answer.text, ANSWER_TOKENS) for answer in answers if answer.text]
        if not own:
            raise DamagedError(
                f"fine-tune {number} says nothing to any harmless request: its weights may be damaged. Load it again, "
                "or leave it out."
            )
        yield _Lessons(model, sites(model), refusals, own, rows)
