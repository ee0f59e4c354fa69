"""Making a lock from an aligned base: the recipe of arXiv 2410.10343, seeded and split by pair; and two of our own.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastlock.errors import FastlockError, check_number
from fastlock.inference.batching import Progress, no_progress
from fastlock.inference.chat import check_row, prompt_tokens
from fastlock.inference.generation import input_device
from fastlock.locks.lock import Lock
from fastlock.models.reloaded import check_unlocked
from fastlock.models.sites import Site, sites, text_config, unwrapped
from fastlock.recipes.activations import ReadText, activations_of
from fastlock.recipes.head_scores import Statistics, statistics
from fastlock.recipes.pairs import Pair, pair_from, pairs_digest, shipped_harmless
from fastlock.version import __version__

# The recipes, and how many tokens each reads by default.
TOKENS = {"safetylock": 5, "answer-start": 5, "prompt-end": 1}


@dataclass(frozen=True, eq=False)
class Ranking(Statistics):
    """Every head of a base with its score, direction and scale: one reading gives locks of any number of heads.

    Attributes:
        scores, directions, scales: of all heads, see `Statistics`.
        recipe, tokens, seed: as given to `rank_heads`.
        hidden_size: the base's.
        base_model: its name, None where unknown.
        extraction_digest: of the texts that were read.
    """

    recipe: str
    tokens: int
    seed: int
    hidden_size: int
    base_model: str | None
    extraction_digest: str

    def lock(self, heads: int) -> Lock:
        """The lock of the `heads` heads of the highest scores; of equal ones the lower (layer, head) goes first.

        Args:
            heads: 1 to all of the model's.

        Returns:
            The lock, its rows sorted by (layer, head), with the base's geometry and its provenance.

        Raises:
            FastlockError: there are fewer heads, or a chosen one is the same for both kinds.
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
                    "direction (a pruned head, or texts that end alike). Ask for fewer heads, or for more tokens."
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
            recipe=_description(self.recipe, heads, self.tokens, self.seed),
            extraction_digest=self.extraction_digest,
            fastlock_version=__version__,
        )


def extract(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, Any]],
    heads: int = 24,
    tokens: int | None = None,
    *,
    recipe: str = "safetylock",
    harmless: Iterable[str] | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Lock:
    """Extract a lock from an aligned base: the heads that best tell safe from unsafe answers, and their directions.

    Args:
        heads: how many heads to lock; the paper takes 24, and 48 for models of 70 billion parameters and more.
        model, tokenizer, pairs, tokens, recipe, harmless, seed, progress, work: as for `rank_heads`.

    Returns:
        The lock, its rows sorted by (layer, head), with the base's geometry and its provenance.

    Raises:
        FastlockError: as `rank_heads` and `Ranking.lock` do; too many heads before anything is read.
    """
    all_sites = sites(unwrapped(model))
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

    By the recipes "safetylock" and "answer-start" the model reads every question with its safe and with its unsafe
    answer, in the tokenizer's chat template if it has one. Each head is scored by a logistic regression trained on 60 %
    of the pairs and validated on the others; all the pairs give its direction and scale. By the recipe "prompt-end" it
    reads the questions alone, and harmless prompts. The same inputs on the same machine give the same ranking.

    Args:
        model: a transformers model of a family that fastlock knows, on any device; it is left as it was.
        tokenizer: its tokenizer.
        pairs: the extraction set, see `load_pairs` and `shipped_pairs`; dictionaries of the same keys do as well, and
            so does a `datasets.Dataset` of them. A pair given twice counts once.
        tokens: how many tokens are read: the last ones of each answer ("safetylock", by default the paper's 5), the
            first ones ("answer-start", 5), or the last ones of each prompt ("prompt-end", 1). Of a shorter answer all
            are, and never any of its prompt, which is the same for both answers.
        recipe: "safetylock", "answer-start" or "prompt-end".
        harmless: for "prompt-end", what the questions of the pairs are held against; by default `shipped_harmless()`.
        seed: decides which pairs train and which validate, 0 to 2**32 - 1.
        progress: wraps the two long loops as `progress(items, description)`; `rich.progress.track` fits.
        work: a directory that keeps the activations: the same call goes on there after an interruption, and ranks
            again without reading. They take 4 bytes for each number: 0.5 GB for the shipped pairs and a model of 8
            billion parameters. By default they are in a temporary directory.

    Raises:
        FastlockError: a pair or a number can't be used, the model is relocked or of a family that fastlock refuses,
            it computes NaN or infinite activations, memory runs out with a single text, there is too little room on
            the disk, or `work` is of another call.
    """
    pairs = _checked_pairs(pairs)
    inner = unwrapped(model)
    all_sites = sites(inner)
    _check_base(inner, all_sites)
    harmless = _checked_harmless(recipe, harmless)
    tokens = TOKENS[recipe] if tokens is None else tokens
    check_number("tokens", tokens, 1, 2**31)
    check_number("seed", seed, 0, 2**32 - 1)
    progress = progress or no_progress
    if recipe == "prompt-end":
        texts = _prompt_ends(inner, tokenizer, pairs, harmless, tokens)
    else:
        texts = _answers(inner, tokenizer, pairs, tokens, recipe)
    texts.sort(key=lambda text: len(text.ids))
    kept = [text.kept for text in texts]
    safe = np.repeat([text.safe for text in texts], kept)
    train = None if recipe == "prompt-end" else np.repeat(_split(len(pairs), seed)[[t.pair for t in texts]], kept)
    with activations_of(inner, all_sites, texts, progress, work) as activations:
        found = statistics(activations, safe, train, input_device(inner), progress)
    return Ranking(
        **vars(found),
        recipe=recipe,
        tokens=tokens,
        seed=seed,
        hidden_size=text_config(inner).hidden_size,
        base_model=base_name(inner),
        extraction_digest=pairs_digest(pairs, harmless),
    )


def _description(recipe: str, heads: int, tokens: int, seed: int) -> str:
    if recipe == "prompt-end":
        return f"prompt-end: last {tokens} prompt tokens, {heads} heads by effect size"
    which = "first" if recipe == "answer-start" else "last"
    return f"{recipe}: {which} {tokens} answer tokens, {heads} heads by logistic regression, seed {seed}"


def base_name(model: nn.Module) -> str | None:
    """The base's name on a hub, or of its directory: the path of this machine says nothing on another."""
    config: Any = model.config
    path = Path(config._name_or_path or "")
    return path.resolve().name if path.name and path.is_dir() else str(path) if path.name else None


@dataclass(frozen=True)
class _Answer(ReadText):
    """A text, of which pair it is, and whether it is of the kind that the lock leads to."""

    pair: int
    safe: bool


def _answers(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], tokens: int, recipe: str) -> list[_Answer]:
    """Of each pair the safe answer, then the unsafe one; for answer-start no more of them than is kept."""
    answers = []
    for index, pair in enumerate(pairs):
        prompt, space = prompt_tokens(tokenizer, pair.question)
        for safe, words in ((True, pair.safe), (False, pair.unsafe)):
            answer = list(tokenizer(space + words, add_special_tokens=False)["input_ids"])
            if not answer:
                raise FastlockError(f"pair {index + 1}: the tokenizer makes no token of the answer {words[:80]!r}.")
            answer = answer[:tokens] if recipe == "answer-start" else answer
            text = _Answer(prompt + answer, min(tokens, len(answer)), f"pair {index + 1}", index, safe)
            check_row(model, text.ids, text.name)
            answers.append(text)
    return answers


def _prompt_ends(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], harmless: Sequence[str], tokens: int
) -> list[_Answer]:
    """The questions of the pairs, then the harmless prompts."""
    kinds = [(f"pair {n}", pair.question, True) for n, pair in enumerate(pairs, start=1)]
    kinds += [(f"harmless prompt {n}", prompt, False) for n, prompt in enumerate(harmless, start=1)]
    prompts = []
    for index, (name, words, harmful) in enumerate(kinds):
        ids, _ = prompt_tokens(tokenizer, words)
        prompts.append(_Answer(ids, min(tokens, len(ids)), name, index, harmful))
        check_row(model, ids, name)
    return prompts


def _split(num_pairs: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which pairs train: 60 %, rounded down. RandomState's stream is the one that NumPy never changes."""
    train = np.zeros(num_pairs, dtype=np.bool_)
    train[np.random.RandomState(seed).permutation(num_pairs)[: num_pairs * 6 // 10]] = True
    return train


def _checked_pairs(pairs: Any) -> tuple[Pair, ...]:
    """The distinct pairs, in order: one that is there twice could both train and validate."""
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise FastlockError(f"pairs is a {type(pairs).__name__}; read a file with fastlock.load_pairs(path) first.")
    if isinstance(pairs, Mapping):
        raise FastlockError(f"pairs is a {type(pairs).__name__} of {', '.join(map(str, pairs))}; give a list of pairs.")
    distinct = tuple(dict.fromkeys(pair_from(entry, f"pair {n}") for n, entry in enumerate(pairs, start=1)))
    if len(distinct) < 2:
        raise FastlockError(
            f"there {'are no pairs' if not distinct else 'is one pair only'}; some train and others validate. "
            "Give at least two different pairs; the paper takes 100, and so does fastlock.shipped_pairs()."
        )
    return distinct


def _checked_harmless(recipe: str, harmless: Any) -> tuple[str, ...]:
    """The distinct harmless prompts; none for a recipe that reads none."""
    if recipe not in TOKENS:
        raise FastlockError(f"recipe {recipe!r}: there is none of that name. Take one of {', '.join(TOKENS)}.")
    if recipe != "prompt-end":
        if harmless is not None:
            raise FastlockError(f"the recipe {recipe} reads no harmless prompts. Leave them out, or take prompt-end.")
        return ()
    if harmless is None:
        return shipped_harmless()
    if isinstance(harmless, (str, bytes)) or not isinstance(harmless, Iterable):
        raise FastlockError(f"harmless is a {type(harmless).__name__}; give a list of texts.")
    distinct = tuple(dict.fromkeys(harmless))
    if len(distinct) < 2 or not all(isinstance(text, str) and text.strip() for text in distinct):
        raise FastlockError("harmless: give at least two different prompts, none of them empty.")
    return distinct


def _check_heads(heads: int, num_layers: int, num_heads: int) -> None:
    check_number("heads", heads, 1, num_layers * num_heads, f" (the model has {num_layers} layers of {num_heads})")


def _check_base(model: nn.Module, all_sites: Sequence[Site]) -> None:
    check_unlocked(model, "a lock comes from the base without one")
    if len({id(site.module) for site in all_sites}) < len(all_sites):
        raise FastlockError(
            f"{type(model).__name__}: some of its layers share one output projection, so that a lock on one would act "
            "in the others. Such a model can't be locked."
        )
