"""A lock that is trained on an aligned base and some fine-tunes of it: a gate, a constant, or both.

`gate_training.py` and `constant_training.py` say what is minimised; here is what both are given, and the lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlock.errors import FastlockError, MismatchError, check_number
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.keyword_judge import refuses
from fastlock.inference.batching import Progress, no_progress
from fastlock.locks.lock import Lock
from fastlock.models.reloaded import check_unlocked
from fastlock.models.sites import Site, sites, unwrapped
from fastlock.recipes.constant_training import ConstantSettings, train_constant
from fastlock.recipes.gate_lock import checked_layers, gated_rows, lock_of
from fastlock.recipes.gate_training import Asked, train_gate
from fastlock.recipes.gate_weights import GateSettings, TrainedGate
from fastlock.recipes.pairs import (
    Pair,
    pair_from,
    pairs_digest,
    shipped_harmless,
    shipped_pairs,
    shipped_scary,
    shipped_texts,
)

GATE_STEPS, CONSTANT_STEPS = 270, 100


def train_lock(
    base: nn.Module,
    fine_tunes: Sequence[nn.Module],
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, str]] | None = None,
    *,
    harmless: Iterable[str] | None = None,
    scary: Iterable[str] | None = None,
    texts: Iterable[str] | None = None,
    rank: int = 1,
    constant: bool = False,
    layers: Iterable[int] | None = None,
    heads: int | None = None,
    steps: int | None = None,
    batch_size: int = 6,
    judge: Judge = refuses,
    seed: int = 42,
    progress: Progress | None = None,
) -> Lock:
    """Train a lock of an aligned base on it and on some fine-tunes of it; its strength is 1.

    The models' weights are left as they were. A gate (rank 1 and more) learns on the base and every fine-tune in turn,
    a constant alone (rank 0; LoFiT, arXiv 2406.01563) on the fine-tunes. The same inputs on the same machine give the
    same lock.

    Args:
        base: the aligned base, a transformers model, whose answers to the harmful requests are learned.
        fine_tunes: at least one model of the same geometry, on any device: some that refuse less and, for a gate, some
            that do not. The more they differ in kind, the better the lock suits others.
        tokenizer: theirs.
        pairs: their questions are the harmful requests. A gate learns from those that the base refuses, also after the
            first words of the unsafe answer; a constant alone learns the safe answer where the base does not refuse.
            By default the shipped ones.
        harmless: requests to be answered as before; by default the shipped ones.
        scary: further ones that only sound harmful, one of which is in every second step of a gate; by default the
            shipped ones.
        texts: ordinary texts to be read as before; by default the shipped ones.
        rank: of the gate in each layer; 0 for a constant alone.
        constant: whether the lock has a constant beside the gate, which takes a bias where it is relocked.
        layers: those with a gate; by default, all from the one on from which the base tells harmful requests from
            harmless ones.
        heads: how many heads to lock, those that moved most in the first half of the steps; by default all of them, of
            a gate all in its layers.
        steps: how many steps; by default 270, with rank 0 100; at least 2 if `heads` is given.
        batch_size: how many harmful requests a step reads. A constant alone reads as many harmless ones and texts, a
            gate half as many again and a third as many.
        judge: tells which requests the base refuses, as in `fastlock.evaluate`.
        seed: decides the order and where the further columns of a gate start, 0 to 2**32 - 1.
        progress: wraps the long loops as `progress(items, description)`.

    Returns:
        The lock, with the base's geometry and its provenance; each scale is the length of the displacement, 0 without
        a constant.

    Raises:
        MismatchError: the geometry of a fine-tune is not the base's.
        UnsupportedError: the models' family is refused.
        DamagedError: a model's numbers, or the loss, are NaN or infinite, or a fine-tune says nothing.
        FastlockError: there is nothing to train on, the base refuses or answers too little, no layers are told apart,
            a model is relocked, or an argument cannot be used.
    """
    entries = shipped_pairs() if pairs is None else pairs
    learned = [pair_from(pair, f"pair {n}") for n, pair in enumerate(entries, 1)]
    harmless = shipped_harmless() if harmless is None else tuple(harmless)
    texts = shipped_texts() if texts is None else tuple(texts)
    aligned, models = unwrapped(base), [unwrapped(model) for model in fine_tunes]
    all_sites = sites(aligned)
    _check_models(aligned, models, all_sites, {"pairs": learned, "harmless": harmless, "texts": texts})
    _check_numbers(all_sites, rank, heads, steps, batch_size, seed)
    shown = progress or no_progress
    if not rank:
        _refuse_with_rank_0(scary=scary, layers=layers)
        settings = ConstantSettings(heads, CONSTANT_STEPS if steps is None else steps, batch_size, seed)
        d = train_constant(aligned, models, tokenizer, learned, harmless, texts, settings, judge, shown)
        return _constant_lock(d, base, len(models), settings.steps, seed, pairs_digest(learned, (*harmless, *texts)))
    scary = shipped_scary() if scary is None else tuple(scary)
    chosen = None if layers is None else checked_layers(layers, len(all_sites))
    how = GateSettings(rank, bool(constant), chosen, heads, GATE_STEPS if steps is None else steps, batch_size, seed)
    asked = Asked({pair.question: pair.unsafe for pair in learned}, harmless, scary, texts)
    gate = train_gate(aligned, models, tokenizer, asked, how, judge, shown)
    return _gated_lock(gate, base, len(models), how, pairs_digest(learned, (*harmless, *scary, *texts)))


def _gated_lock(gate: TrainedGate, base: nn.Module, models: int, how: GateSettings, digest: str) -> Lock:
    rows = gated_rows(sites(unwrapped(base))[0], gate.layers, gate.readers, gate.writers, gate.constant, gate.kept)
    both = "" if gate.constant is None else " and constant"
    recipe = (
        f"trained: rank {how.rank} gate{both}, {len(rows['layers'])} heads, {how.steps} steps on the base and {models} "
        f"fine-tunes, seed {how.seed}"
    )
    return lock_of(base, recipe, digest, 1.0, **rows)


def _constant_lock(d: torch.Tensor, base: nn.Module, models: int, steps: int, seed: int, digest: str) -> Lock:
    length = d.norm(dim=-1)
    layers, heads = length.nonzero(as_tuple=True)
    return lock_of(
        base,
        f"trained: {len(layers)} heads, {steps} steps on {models} fine-tunes, seed {seed}",
        digest,
        1.0,
        layers=layers,
        heads=heads,
        directions=d[layers, heads] / length[layers, heads, None],
        scales=length[layers, heads],
    )


def _check_models(
    base: nn.Module, models: Sequence[nn.Module], base_sites: Sequence[Site], material: Mapping[str, Sequence[Any]]
) -> None:
    for name, items in {"fine_tunes": models, **material}.items():
        if not items:
            raise FastlockError(f"{name}: there are none, and a lock cannot be trained without them.")
    layers, site = len(base_sites), base_sites[0]
    for name, model in (("the base", base), *((f"fine-tune {n}", m) for n, m in enumerate(models, 1))):
        check_unlocked(model, "a lock is trained on models without one", name=name)
        own = sites(model)
        if (len(own), own[0].num_heads, own[0].head_dim) != (layers, site.num_heads, site.head_dim):
            raise MismatchError(
                f"{name} has {len(own)} layers of {own[0].num_heads} heads of {own[0].head_dim}, and the base "
                f"{layers} of {site.num_heads} of {site.head_dim}. Give fine-tunes of this base."
            )


def _check_numbers(
    all_sites: Sequence[Site], rank: int, heads: int | None, steps: int | None, batch_size: int, seed: int
) -> None:
    site = all_sites[0]
    check_number("rank", rank, 0, site.num_heads * site.head_dim)
    total = len(all_sites) * site.num_heads
    check_number("heads", total if heads is None else heads, 1, total)
    least = 1 if heads is None else 2  # heads are chosen after the first half
    check_number("steps", least if steps is None else steps, least, 2**31)
    check_number("batch_size", batch_size, 1, 2**31)
    check_number("seed", seed, 0, 2**32 - 1)


def _refuse_with_rank_0(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise FastlockError(
                f"{name}: a constant alone (rank 0) makes no use of it. Leave it out, or train a gate: rank 1 or more."
            )
