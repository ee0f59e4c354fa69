"""Making a lock from an aligned base: the recipe of arXiv 2410.10343, seeded and split by pair, and two of our own.

Over the vectors x of one head (the input of its layer's output projection):

    direction  u = (mean x of the one kind − mean x of the other), normalised
    scale      σ = standard deviation of x · u over all of them

The recipes differ in what x is, and in how the heads are chosen:

    safetylock    at the last tokens of safe answers, against those of unsafe ones to the same questions; by the mean of
                  train and validation accuracy of a logistic regression that tells safe x from unsafe x
    answer-start  at the first tokens of these answers; chosen in the same way
    prompt-end    at the last tokens of harmful prompts, before any answer, against those of harmless ones; by the
                  effect size (Cohen's d) of x · u
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastlock.errors import FastlockError, check_number
from fastlock.inference.batching import Progress, no_progress
from fastlock.inference.generation import input_device
from fastlock.locks.lock import Lock
from fastlock.models.base_norms import base_norms
from fastlock.models.names import base_name
from fastlock.models.sites import sites, text_config, unwrapped
from fastlock.recipes.activations import activations_of
from fastlock.recipes.extraction_checks import check_extractable, checked_pairs, checked_prompts
from fastlock.recipes.gate_recipe import GateMaterial
from fastlock.recipes.head_scores import Statistics, statistics
from fastlock.recipes.pairs import Pair, pairs_digest, shipped_harmless
from fastlock.recipes.recipe import Recipe
from fastlock.recipes.recipe_table import GATE_RECIPES, RECIPES, recipe_named
from fastlock.version import __version__

HEADS = 24


@dataclass(frozen=True, eq=False)
class Ranking(Statistics):
    """Every head of a base with its score, direction and scale: one reading gives locks of any number of heads.

    Attributes:
        scores, directions, scales: of all heads, see `Statistics`.
        recipe, tokens, seed: as given to `rank_heads`.
        hidden_size: the base's.
        base_model: the base's name; None where unknown.
        extraction_digest: SHA-256 (hex) of the pairs and prompts that were given.
        column_norms: of the base's output projections, [num_layers, num_heads, head_dim] float32; None where unknown.
    """

    recipe: str
    tokens: int
    seed: int
    hidden_size: int
    base_model: str | None
    extraction_digest: str
    column_norms: torch.Tensor | None = None

    def lock(self, heads: int) -> Lock:
        """The lock of the heads with the highest scores; among equal ones, the lower (layer, head) goes first.

        Args:
            heads: how many, from 1 to all of the model's.

        Returns:
            The lock, its rows sorted by (layer, head), with the base's geometry and its provenance.

        Raises:
            FastlockError: the model has fewer heads, or a chosen head has no direction.
        """
        num_layers, num_heads, head_dim = self.directions.shape
        _check_heads(heads, num_layers, num_heads)
        best = np.sort(np.argsort(-self.scores, axis=None, kind="stable")[:heads])
        layers, columns = np.divmod(best, num_heads)
        directions = self.directions[layers, columns]
        for layer, head, direction in zip(layers, columns, directions, strict=True):
            if not direction.any():
                raise FastlockError(
                    f"layer {layer}, head {head}: its mean output is the same for both kinds of texts, so it has no "
                    "direction (a pruned head, or texts that end alike). Ask for fewer heads or more tokens."
                )
        return Lock(
            layers=torch.from_numpy(layers),
            heads=torch.from_numpy(columns),
            directions=torch.from_numpy(directions),
            scales=torch.from_numpy(self.scales[layers, columns]),
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            hidden_size=self.hidden_size,
            base_model=self.base_model,
            recipe=RECIPES[self.recipe].description(heads, self.tokens, self.seed),
            extraction_digest=self.extraction_digest,
            fastlock_version=__version__,
            column_norms=None if self.column_norms is None else self.column_norms[layers, columns],
        )


def extract(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, Any]],
    heads: int | None = None,
    tokens: int | None = None,
    *,
    recipe: str = "safetylock",
    harmless: Iterable[str] | None = None,
    scary: Iterable[str] | None = None,
    texts: Iterable[str] | None = None,
    rank: int | None = None,
    layers: Iterable[int] | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Lock:
    """Extract a lock from an aligned base: the heads that best tell safe from unsafe answers, and their directions.

    With the recipe "null-space", the lock is a gate: what it adds depends on what the heads say.

    Args:
        heads: how many heads to lock: by default 24, as the paper (arXiv 2410.10343), which takes 48 for models of 70
            billion parameters and more. A gate reads all heads of its layers.
        model, tokenizer, pairs, tokens, recipe, harmless, seed, progress, work: as for `rank_heads`; "null-space" reads
            the harmless prompts, and what the base answers, too, and the first 3 tokens of the answers in `pairs`.
        scary: for a gate, further harmless prompts, which only sound harmful; by default the shipped ones.
        texts: for a gate, ordinary texts; by default the shipped ones.
        rank: of the gate, 1 by default.
        layers: those with a gate; by default, all from the one on from which the base tells harmful requests from
            harmless ones.

    Returns:
        The lock, its rows sorted by (layer, head), with the base's geometry and its provenance.

    Raises:
        FastlockError, and its kinds: as for `rank_heads` and `Ranking.lock`; too many heads are refused before anything
            is read. An argument that the recipe does not know is refused as well.
    """
    for_gates: dict[str, Any] = {"scary": scary, "texts": texts, "rank": rank, "layers": layers}
    if recipe in GATE_RECIPES:
        _refuse(
            f"the recipe {recipe} makes a gate, which reads all heads of its layers at once", heads=heads, work=work
        )
        material = GateMaterial.checked(model, tokenizer, pairs, harmless, scary, texts)
        return GATE_RECIPES[recipe].lock(material, rank, tokens, layers, progress or no_progress)
    gates = " or ".join(GATE_RECIPES)
    _refuse(f"the recipe {recipe} makes a lock without a gate; {gates} makes one with a gate", **for_gates)
    all_sites = sites(unwrapped(model))
    heads = HEADS if heads is None else heads
    _check_heads(heads, len(all_sites), all_sites[0].num_heads)
    ranking = rank_heads(
        model, tokenizer, pairs, tokens, recipe=recipe, harmless=harmless, seed=seed, progress=progress, work=work
    )
    return ranking.lock(heads)


def rank_heads(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, Any]],
    tokens: int | None = None,
    *,
    recipe: str = "safetylock",
    harmless: Iterable[str] | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Ranking:
    """Score every head of an aligned base, and find its direction and scale.

    With the recipes "safetylock" (arXiv 2410.10343) and "answer-start", the model reads every question with its safe
    and with its unsafe answer, in the tokenizer's chat template if it has one. Each head is scored by a logistic
    regression trained on 60 % of the pairs and validated on the others; all pairs give its direction and scale. With
    the recipe "prompt-end", it reads the questions alone, and harmless prompts. The same inputs on the same machine
    give the same ranking.

    Args:
        model: a transformers model of a family that fastlock knows, on any device; it is left as it was.
        tokenizer: its tokenizer.
        pairs: the extraction set, see `load_pairs` and `shipped_pairs`; dictionaries with the same keys will do, and so
            will a `datasets.Dataset` of them. A repeated pair counts once.
        tokens: how many tokens are read: the last ones of each answer ("safetylock", by default the paper's 5), the
            first ones ("answer-start", 5), or the last ones of each prompt ("prompt-end", 1). A shorter answer is read
            as a whole, without its prompt, which is the same for both answers.
        recipe: "safetylock", "answer-start" or "prompt-end".
        harmless: for "prompt-end", the prompts that the questions are compared with; by default `shipped_harmless()`.
        seed: decides which pairs train and which validate, 0 to 2**32 - 1.
        progress: wraps the two long loops as `progress(items, description)`; `rich.progress.track` fits.
        work: a directory that keeps the activations: after an interruption, the same call resumes there, and a finished
            reading is ranked again without reading. They take 4 bytes per number: 0.5 GB for the shipped pairs and a
            model of 8 billion parameters. By default they are in a temporary directory.

    Returns:
        Scores [num_layers, num_heads], directions [num_layers, num_heads, head_dim] and scales [num_layers, num_heads],
        all float64.

    Raises:
        UnsupportedError: the model's family is refused, or some of its layers share one output projection.
        DamagedError: the model computes NaN or infinite activations, or `work` is damaged.
        FastlockError: a pair or a number cannot be used, the model is relocked, memory runs out with a single text,
            there is too little room on the disk, or `work` is of another call.
    """
    chosen = recipe_named(recipe)
    pairs = checked_pairs(pairs)
    inner = unwrapped(model)
    all_sites = sites(inner)
    check_extractable(inner, all_sites)
    harmless = _checked_harmless(chosen, harmless)
    tokens = chosen.tokens if tokens is None else tokens
    check_number("tokens", tokens, 1, 2**31)
    check_number("seed", seed, 0, 2**32 - 1)
    progress = progress or no_progress
    texts = sorted(chosen.texts(inner, tokenizer, pairs, harmless, tokens), key=lambda text: len(text.ids))
    kept, owners = [text.kept for text in texts], [text.owner for text in texts]
    safe = np.repeat([text.safe for text in texts], kept)
    train = np.repeat(_split(max(owners) + 1, seed)[owners], kept)
    with activations_of(inner, all_sites, texts, progress, work) as activations:
        scored = statistics(activations, safe, train, chosen.scoring, input_device(inner), progress)
    return Ranking(
        **vars(scored),
        recipe=recipe,
        tokens=tokens,
        seed=seed,
        hidden_size=text_config(inner).hidden_size,
        base_model=base_name(inner),
        extraction_digest=pairs_digest(pairs, harmless),
        column_norms=base_norms(all_sites),
    )


def _split(owners: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which owners train: 60 %, rounded down. RandomState's stream is the one that NumPy never changes."""
    train = np.zeros(owners, dtype=np.bool_)
    train[np.random.RandomState(seed).permutation(owners)[: owners * 6 // 10]] = True
    return train


def _checked_harmless(recipe: Recipe, harmless: Any) -> tuple[str, ...]:
    """The distinct harmless prompts; none for a recipe that reads none."""
    if not recipe.reads_harmless:
        if harmless is not None:
            readers = " or ".join(other.name for other in RECIPES.values() if other.reads_harmless)
            raise FastlockError(
                f"the recipe {recipe.name} reads no harmless prompts. Leave them out, or choose {readers}."
            )
        return ()
    if harmless is None:
        return shipped_harmless()
    return checked_prompts("harmless", harmless)


def _check_heads(heads: int, num_layers: int, num_heads: int) -> None:
    check_number("heads", heads, 1, num_layers * num_heads, f" (the model has {num_layers} layers of {num_heads})")


def _refuse(reason: str, **given: Any) -> None:
    """Refuse arguments that the recipe makes no use of, and that were given all the same."""
    for name, value in given.items():
        if value is not None:
            raise FastlockError(f"{name}: {reason}. Leave it out, or choose another recipe.")
