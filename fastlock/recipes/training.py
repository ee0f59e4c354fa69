"""A lock that is trained: one displacement of the heads that makes fine-tunes refuse as their aligned base does.

LoFiT (arXiv 2406.01563) learns offsets that are added to the outputs of attention heads, which is what a lock holds.
Here they are learned once, on a few fine-tunes of the base, by gradient descent on the sum of

    cross-entropy          of the base's own refusals of harmful requests
    2 x KL divergence      from the fine-tune without the lock, in its own answers to harmless requests
    3 x KL divergence      from the fine-tune without the lock, in ordinary texts

Nothing is read off the activations, and what the lock costs is part of what is minimised.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.errors import DamagedError, FastlockError, MismatchError, check_number
from fastlock.evaluation.evaluator import evaluate
from fastlock.evaluation.prompts import Prompts
from fastlock.inference.batching import Progress, no_progress
from fastlock.inference.chat import prompt_tokens
from fastlock.inference.generation import in_eval_mode, input_device
from fastlock.locks.lock import Lock
from fastlock.models.base_norms import base_norms
from fastlock.models.names import base_name
from fastlock.models.reloaded import check_unlocked
from fastlock.models.sites import Site, sites, text_config, unwrapped
from fastlock.models.unfolded import displaced
from fastlock.recipes.pairs import Pair, pair_from, pairs_digest, shipped_harmless, shipped_pairs, shipped_texts
from fastlock.version import __version__

ANSWER_TOKENS, TEXT_TOKENS = 12, 48
RATE, WARM_UP, LAST_RATE = 0.005, 3, 0.1
OWN_WEIGHT, TEXT_WEIGHT = 2.0, 3.0
_IGNORED = -100


@dataclass(frozen=True)
class _Row:
    """Tokens, and how many of them count, from the end."""

    ids: list[int]
    counted: int


@dataclass(frozen=True)
class _Lessons:
    """A fine-tune and its sites, with what it learns to refuse, and what it should still say."""

    model: nn.Module
    sites: Sequence[Site]
    refusals: Sequence[_Row]
    own: Sequence[_Row]
    texts: Sequence[_Row]


def train_lock(
    base: nn.Module,
    fine_tunes: Sequence[nn.Module],
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, str]] | None = None,
    *,
    harmless: Iterable[str] | None = None,
    texts: Iterable[str] | None = None,
    heads: int | None = None,
    steps: int = 100,
    batch_size: int = 6,
    seed: int = 42,
    progress: Progress | None = None,
) -> Lock:
    """Train a lock of an aligned base on some fine-tunes of it, as LoFiT (arXiv 2406.01563) does; its strength is 1.

    The models' weights are left as they were; a step is a forward and a backward pass of three batches through one of
    the fine-tunes, in turn. The same inputs on the same machine give the same lock.

    Args:
        base: the aligned base, a transformers model, whose answers to the harmful requests are learned.
        fine_tunes: at least one model of the same geometry that refuses less, on any device. The more they differ in
            kind, the better the lock suits others.
        tokenizer: theirs.
        pairs: their questions are the harmful requests; the safe answer is learned where the base does not refuse. By
            default the shipped ones.
        harmless: requests to be answered as before; by default the shipped ones.
        texts: ordinary texts to be read as before; by default the shipped ones.
        heads: how many heads to lock, those that moved most in the first half of the steps; by default all of them.
        steps: how many steps; at least 2 if `heads` is given.
        batch_size: how many requests, and how many texts, a step reads.
        seed: decides the order, 0 to 2**32 - 1.
        progress: wraps the loop over the steps as `progress(items, description)`.

    Returns:
        The lock, with the base's geometry and its provenance; each scale is the length of the displacement.

    Raises:
        MismatchError: the geometry of a fine-tune is not the base's.
        UnsupportedError: the models' family is refused.
        DamagedError: a fine-tune says nothing, or the loss becomes NaN or infinite.
        FastlockError: there is nothing to train on, a model is relocked, or a number cannot be used.
    """
    entries = shipped_pairs() if pairs is None else pairs
    learned = [pair_from(pair, f"pair {n}") for n, pair in enumerate(entries, 1)]
    harmless = shipped_harmless() if harmless is None else tuple(harmless)
    texts = shipped_texts() if texts is None else tuple(texts)
    models = [unwrapped(model) for model in fine_tunes]
    base_sites = sites(unwrapped(base))
    total = len(base_sites) * base_sites[0].num_heads
    _check(base, models, base_sites, {"pairs": learned, "harmless": harmless, "texts": texts})
    check_number("heads", total if heads is None else heads, 1, total)
    check_number("steps", steps, 1 if heads is None else 2, 2**31)  # heads are chosen after the first half
    check_number("batch_size", batch_size, 1, 2**31)
    check_number("seed", seed, 0, 2**32 - 1)
    lessons = list(_lessons(base, models, tokenizer, learned, harmless, texts))
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        for model in models:
            undo.enter_context(_frozen(model))
        rounds = (progress or no_progress)(range(steps), "Training the lock")
        d = _displacement(lessons, rounds, steps, heads, batch_size, random.Random(seed))
    return _lock(d, base, len(models), steps, seed, pairs_digest(learned, (*harmless, *texts)))


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
            kept = _largest(d.detach(), heads)
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
    if not torch.tensor(total).isfinite():
        raise DamagedError(
            f"step {step + 1}: the loss is {total}. The weights are damaged, or overflow in this dtype: load the "
            "models in bfloat16 or float32."
        )


def _predictions(model: nn.Module, batch: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
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


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Put every parameter out of training, and every module into eval mode; afterwards, all are as before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with in_eval_mode(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _lessons(
    base: nn.Module,
    models: Sequence[nn.Module],
    tokenizer: Any,
    pairs: Sequence[Pair],
    harmless: Sequence[str],
    texts: Sequence[str],
) -> Iterator[_Lessons]:
    prompts = Prompts(harmful=tuple(pair.question for pair in pairs))
    answers = evaluate(base, tokenizer, prompts, new_tokens=ANSWER_TOKENS)[0].harmful
    refusals = [
        _row(tokenizer, pair.question, answer.text if answer.refused else pair.safe)
        for pair, answer in zip(pairs, answers, strict=True)
    ]
    ids = [list(tokenizer(text)["input_ids"])[:TEXT_TOKENS] for text in texts]
    rows = [_Row(tokens, len(tokens) - 1) for tokens in ids if len(tokens) > 1]
    if not rows:
        raise FastlockError("texts: none of them has two tokens, and there is nothing to predict. Give longer ones.")
    for number, model in enumerate(models, 1):
        answers = evaluate(model, tokenizer, Prompts(harmless=tuple(harmless)), new_tokens=ANSWER_TOKENS)[0].harmless
        own = [_row(tokenizer, answer.prompt, answer.text) for answer in answers if answer.text]
        if not own:
            raise DamagedError(
                f"fine-tune {number} says nothing to any harmless request: its weights may be damaged. Load it again, "
                "or leave it out."
            )
        yield _Lessons(model, sites(model), refusals, own, rows)


def _row(tokenizer: Any, question: str, answer: str) -> _Row:
    prompt, space = prompt_tokens(tokenizer, question)
    words = list(tokenizer(space + answer, add_special_tokens=False)["input_ids"])[:ANSWER_TOKENS]
    return _Row(prompt + words, len(words))


def _largest(d: torch.Tensor, heads: int) -> torch.Tensor:
    """Ones for the heads with the longest displacements, zeros for the others: [num_layers, num_heads, 1]."""
    length = d.norm(dim=-1)
    kept = torch.zeros_like(length).flatten()
    kept[length.flatten().argsort(descending=True, stable=True)[:heads]] = 1
    return kept.view(*length.shape, 1)


def _lock(d: torch.Tensor, base: nn.Module, models: int, steps: int, seed: int, digest: str) -> Lock:
    length = d.norm(dim=-1)
    layers, heads = length.nonzero(as_tuple=True)
    num_layers, num_heads, head_dim = d.shape
    norms = base_norms(sites(unwrapped(base)))
    config: Any = text_config(unwrapped(base))
    return Lock(
        layers=layers,
        heads=heads,
        directions=d[layers, heads] / length[layers, heads, None],
        scales=length[layers, heads],
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        base_model=base_name(unwrapped(base)),
        recipe=f"trained: {len(layers)} heads, {steps} steps on {models} fine-tunes, seed {seed}",
        extraction_digest=digest,
        fastlock_version=__version__,
        strength=1.0,
        column_norms=None if norms is None else norms[layers, heads],
    )


def _check(
    base: nn.Module, models: Sequence[nn.Module], base_sites: Sequence[Site], material: Mapping[str, Sequence[Any]]
) -> None:
    for name, items in {"fine_tunes": models, **material}.items():
        if not items:
            raise FastlockError(f"{name}: there are none, and a lock cannot be trained without them.")
    layers, site = len(base_sites), base_sites[0]
    for name, model in (("the base", unwrapped(base)), *((f"fine-tune {n}", m) for n, m in enumerate(models, 1))):
        check_unlocked(model, "a lock is trained on models without one", name=name)
        own = sites(model)
        if (len(own), own[0].num_heads, own[0].head_dim) != (layers, site.num_heads, site.head_dim):
            raise MismatchError(
                f"{name} has {len(own)} layers of {own[0].num_heads} heads of {own[0].head_dim}, and the base "
                f"{layers} of {site.num_heads} of {site.head_dim}. Give fine-tunes of this base."
            )
