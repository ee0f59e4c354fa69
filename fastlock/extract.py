"""Making a lock from an aligned base: the recipe of arXiv 2410.10343, seeded and split by pair; and one of our own.

Over the vectors x of one head (the input of its layer's output projection):

    direction  u = (mean x of the one kind − mean x of the other), normalised
    scale      σ = standard deviation of x · u over all of them

The recipes differ in what x is, and in how the heads are chosen:

    safetylock  at the last tokens of safe answers, against those of unsafe ones to the same questions; by the mean of
                train and validation accuracy of a logistic regression that tells safe x from unsafe x
    prompt-end  at the last tokens of harmful prompts, before any answer, against those of harmless ones; by the effect
                size (Cohen's d) of x · u
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.loaded import receipt_of
from fastlock.lock import Lock
from fastlock.pairs import Pair, pair_from, pairs_digest, shipped_harmless
from fastlock.sites import Site, sites, text_config, unwrapped
from fastlock.version import __version__

Progress = Callable[[Sequence[Any], str], Iterable[Any]]

# The recipes, and how many tokens each reads by default.
LAST_TOKENS = {"safetylock": 5, "prompt-end": 1}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Every head of a base with its score, direction and scale: one reading gives locks of any number of heads.

    Attributes:
        scores: how well each head tells the two kinds apart, [num_layers, num_heads] float64: an accuracy
            ("safetylock"), or an effect size ("prompt-end"); 0 for a head without a direction.
        directions: the unit direction of each, [num_layers, num_heads, head_dim] float64; zeros where there is none.
        scales: [num_layers, num_heads] float64.
        recipe, last_tokens, seed: as given to `rank_heads`.
        hidden_size: the base's.
        base_model: its name, None where unknown.
        extraction_digest: of the texts that were read.
    """

    scores: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    scales: npt.NDArray[np.float64]
    recipe: str
    last_tokens: int
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
                    "direction (a pruned head, or texts that end alike). Ask for fewer heads, or for more last tokens."
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
            recipe=_description(self.recipe, heads, self.last_tokens, self.seed),
            extraction_digest=self.extraction_digest,
            fastlock_version=__version__,
        )


def extract(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, str]],
    heads: int = 24,
    last_tokens: int | None = None,
    *,
    recipe: str = "safetylock",
    harmless: Iterable[str] | None = None,
    seed: int = 42,
    progress: Progress | None = None,
) -> Lock:
    """Extract a lock from an aligned base: the heads that best tell safe from unsafe answers, and their directions.

    Args:
        heads: how many heads to lock; the paper takes 24, and 48 for models of 70 billion parameters and more.
        model, tokenizer, pairs, last_tokens, recipe, harmless, seed, progress: as for `rank_heads`.

    Returns:
        The lock, its rows sorted by (layer, head), with the base's geometry and its provenance.

    Raises:
        FastlockError: as `rank_heads` and `Ranking.lock` do; too many heads before anything is read.
    """
    all_sites = sites(unwrapped(model))
    _check_heads(heads, len(all_sites), all_sites[0].num_heads)
    options: dict[str, Any] = {"recipe": recipe, "harmless": harmless, "seed": seed, "progress": progress}
    return rank_heads(model, tokenizer, pairs, last_tokens, **options).lock(heads)


def rank_heads(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Pair | Mapping[str, str]],
    last_tokens: int | None = None,
    *,
    recipe: str = "safetylock",
    harmless: Iterable[str] | None = None,
    seed: int = 42,
    progress: Progress | None = None,
) -> Ranking:
    """Score every head of an aligned base, and find its direction and scale.

    By the recipe "safetylock" the model reads every question with its safe and with its unsafe answer, in the
    tokenizer's chat template if it has one. Each head is scored by a logistic regression trained on 60 % of the pairs
    and validated on the others; all the pairs give its direction and scale. By the recipe "prompt-end" it reads the
    questions alone, and harmless prompts. The same inputs on the same machine give the same ranking.

    Args:
        model: a transformers model of a family that fastlock knows, on any device; it is left as it was.
        tokenizer: its tokenizer.
        pairs: the extraction set, see `load_pairs` and `shipped_pairs`; dictionaries of the same keys do as well.
            A pair given twice counts once.
        last_tokens: how many tokens at the end are read; by default the paper's 5 of each answer ("safetylock"), 1 of
            each prompt ("prompt-end"). Of a shorter answer all are, and never any of its prompt, which is the same for
            both answers.
        recipe: "safetylock" or "prompt-end".
        harmless: for "prompt-end", what the questions of the pairs are held against; by default `shipped_harmless()`.
        seed: decides which pairs train and which validate, 0 to 2**32 - 1.
        progress: wraps the two long loops as `progress(items, description)`; `rich.progress.track` fits.

    Raises:
        FastlockError: a pair or a number can't be used, the model is relocked or of a family that fastlock refuses,
            or it computes NaN or infinite activations.
    """
    pairs = _checked_pairs(pairs)
    inner = unwrapped(model)
    all_sites = sites(inner)
    _check_base(inner, all_sites)
    harmless = _checked_harmless(recipe, harmless)
    last_tokens = LAST_TOKENS[recipe] if last_tokens is None else last_tokens
    _check_number("last_tokens", last_tokens, 1, 2**31)
    _check_number("seed", seed, 0, 2**32 - 1)
    progress = progress or _no_progress
    if recipe == "prompt-end":
        answers = _prompt_ends(inner, tokenizer, pairs, harmless, last_tokens)
    else:
        answers = _answers(inner, tokenizer, pairs, last_tokens)
    vectors = _read(inner, all_sites, answers, progress)
    safe = np.repeat([answer.safe for answer in answers], [answer.kept for answer in answers])
    directions, scales = _directions(vectors, safe)
    if recipe == "prompt-end":
        scores = _effect_sizes(vectors, safe)
    else:
        train = np.repeat(_split(len(pairs), seed)[[answer.pair for answer in answers]], [a.kept for a in answers])
        scores = _scores(vectors, safe, train, seed, progress)
    return Ranking(
        scores=np.where(directions.any(axis=2), scores, 0.0),
        directions=directions,
        scales=scales,
        recipe=recipe,
        last_tokens=last_tokens,
        seed=seed,
        hidden_size=text_config(inner).hidden_size,
        base_model=_base_name(inner),
        extraction_digest=pairs_digest(pairs, harmless),
    )


def _description(recipe: str, heads: int, last_tokens: int, seed: int) -> str:
    if recipe == "prompt-end":
        return f"prompt-end: last {last_tokens} prompt tokens, {heads} heads by effect size"
    return f"safetylock: last {last_tokens} answer tokens, {heads} heads by logistic regression, seed {seed}"


def _base_name(model: nn.Module) -> str | None:
    """The base's name on a hub, or of its directory: the path of this machine says nothing on another."""
    config: Any = model.config
    path = Path(config._name_or_path or "")
    return path.resolve().name if path.name and path.is_dir() else str(path) if path.name else None


@dataclass(frozen=True)
class _Answer:
    """Tokens to read: how many at their end, of which pair, and whether they are of the kind that the lock leads to."""

    ids: list[int]
    kept: int
    pair: int
    safe: bool


def _answers(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], last_tokens: int) -> list[_Answer]:
    """Of each pair the safe answer, then the unsafe one."""
    answers = []
    for index, pair in enumerate(pairs):
        prompt, space = prompt_tokens(tokenizer, pair.question)
        for safe, text in ((True, pair.safe), (False, pair.unsafe)):
            answer = list(tokenizer(space + text, add_special_tokens=False)["input_ids"])
            if not answer:
                raise FastlockError(f"pair {index + 1}: the tokenizer makes no token of the answer {text[:80]!r}.")
            _check_tokens(model, prompt + answer, index, "pair")
            answers.append(_Answer(prompt + answer, min(last_tokens, len(answer)), index, safe))
    return answers


def _prompt_ends(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], harmless: Sequence[str], last_tokens: int
) -> list[_Answer]:
    """The questions of the pairs, then the harmless prompts."""
    kinds = [(pair.question, True) for pair in pairs] + [(prompt, False) for prompt in harmless]
    answers = []
    for index, (text, harmful) in enumerate(kinds):
        ids, _ = prompt_tokens(tokenizer, text)
        _check_tokens(model, ids, index if harmful else index - len(pairs), "pair" if harmful else "harmless prompt")
        answers.append(_Answer(ids, min(last_tokens, len(ids)), index, harmful))
    return answers


def prompt_tokens(tokenizer: Any, question: str) -> tuple[list[int], str]:
    """The tokens before the answer, and what goes between them and the answer's text."""
    if getattr(tokenizer, "chat_template", None):
        message = {"role": "user", "content": question}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]), ""
    # The space belongs to the answer's first word, as in any text: tokenizers join them.
    return list(tokenizer(f"Question: {question}\nAnswer:")["input_ids"]), " "


def _read(
    model: nn.Module, all_sites: Sequence[Site], answers: Sequence[_Answer], progress: Progress
) -> npt.NDArray[np.float32]:
    """What enters each output projection at the kept tokens: [layers, vectors, num_heads, head_dim]."""
    num_heads, head_dim = all_sites[0].num_heads, all_sites[0].head_dim
    total = sum(answer.kept for answer in answers)
    vectors = np.empty((len(all_sites), total, num_heads, head_dim), dtype=np.float32)
    start = 0
    reader: Any = model.base_model  # the logits, a fifth of the work in a small model, are of no use here
    with evaluating(model), _inputs_of(all_sites) as inputs:
        for answer in progress(answers, "Reading answers"):
            inputs.clear()
            ids = torch.tensor([answer.ids], device=input_device(model))
            reader(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            for site in all_sites:
                kept = inputs[site.layer][0, -answer.kept :].float()
                if not kept.isfinite().all():
                    raise FastlockError(
                        f"{site.name}: NaN or infinite activations in reading pair {answer.pair + 1}. The weights are "
                        "damaged, or overflow in this dtype: load the model in bfloat16 or float32."
                    )
                vectors[site.layer, start : start + answer.kept] = kept.cpu().numpy().reshape(-1, num_heads, head_dim)
            start += answer.kept
    return vectors


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, without gradients; afterwards each in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _inputs_of(all_sites: Sequence[Site]) -> Iterator[dict[int, torch.Tensor]]:
    """A dictionary that every forward pass fills: layer -> the input of its output projection."""
    inputs: dict[int, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for site in all_sites:

            def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], layer: int = site.layer) -> None:
                inputs[layer] = args[0]

            hooks.callback(site.module.register_forward_pre_hook(keep).remove)
        yield inputs


def input_device(model: nn.Module) -> torch.device:
    """Where the tokens go; for a model whose embedding is offloaded, accelerate's hooks move them on from the CPU."""
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.device("cpu") if embedding.device.type == "meta" else embedding.device


def _split(num_pairs: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which pairs train: 60 %, rounded down. RandomState's stream is the one that NumPy never changes."""
    train = np.zeros(num_pairs, dtype=np.bool_)
    train[np.random.RandomState(seed).permutation(num_pairs)[: num_pairs * 6 // 10]] = True
    return train


def _scores(
    vectors: npt.NDArray[np.float32],
    safe: npt.NDArray[np.bool_],
    train: npt.NDArray[np.bool_],
    seed: int,
    progress: Progress,
) -> npt.NDArray[np.float64]:
    """How well each head tells safe from unsafe answers, [num_layers, num_heads]."""
    scores = np.empty((vectors.shape[0], vectors.shape[2]))
    for layer, head in progress(list(np.ndindex(scores.shape)), "Scoring heads"):
        scores[layer, head] = _score(vectors[layer, :, head], safe, train, seed)
    return scores


def _effect_sizes(vectors: npt.NDArray[np.float32], safe: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Cohen's d of both kinds' projections on each head's direction, [num_layers, num_heads]; 0 where it has none."""
    x = vectors.astype(np.float64)
    difference = x[:, safe].mean(axis=1) - x[:, ~safe].mean(axis=1)  # [layers, num_heads, head_dim]
    projected = np.einsum("lvhd,lhd->lvh", x, difference)
    spread = np.sqrt((projected[:, safe].var(axis=1) + projected[:, ~safe].var(axis=1)) / 2)
    gap = projected[:, safe].mean(axis=1) - projected[:, ~safe].mean(axis=1)
    effect: npt.NDArray[np.float64] = np.zeros_like(gap)
    np.divide(gap, spread, out=effect, where=spread > 0)
    return effect


def _score(x: npt.NDArray[np.float32], safe: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_], seed: int) -> float:
    """Mean of train and validation accuracy of a logistic regression on x, [vectors, head_dim]."""
    from sklearn.linear_model import LogisticRegression

    x = x.astype(np.float64)
    probe = LogisticRegression(random_state=seed, max_iter=1000).fit(x[train], safe[train])
    return float(probe.score(x[train], safe[train]) + probe.score(x[~train], safe[~train])) / 2


def _directions(
    vectors: npt.NDArray[np.float32], safe: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The unit direction of every head, [num_layers, num_heads, head_dim], and its scale, [num_layers, num_heads]."""
    num_layers, _, num_heads, head_dim = vectors.shape
    directions = np.zeros((num_layers, num_heads, head_dim))
    scales = np.zeros((num_layers, num_heads))
    for layer, head in np.ndindex(num_layers, num_heads):
        x = vectors[layer, :, head].astype(np.float64)
        difference = x[safe].mean(axis=0) - x[~safe].mean(axis=0)
        if norm := np.linalg.norm(difference):
            directions[layer, head] = difference / norm
            scales[layer, head] = (x @ directions[layer, head]).std()
    return directions, scales


def _checked_pairs(pairs: Any) -> tuple[Pair, ...]:
    """The distinct pairs, in order: one that is there twice could both train and validate."""
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise FastlockError(f"pairs is a {type(pairs).__name__}; read a file with fastlock.load_pairs(path) first.")
    distinct = tuple(dict.fromkeys(pair_from(entry, f"pair {n}") for n, entry in enumerate(pairs, start=1)))
    if len(distinct) < 2:
        raise FastlockError(
            f"there {'are no pairs' if not distinct else 'is one pair only'}; some train and others validate. "
            "Give at least two different pairs; the paper takes 100, and so does fastlock.shipped_pairs()."
        )
    return distinct


def _checked_harmless(recipe: str, harmless: Any) -> tuple[str, ...]:
    """The distinct harmless prompts; none for a recipe that reads none."""
    if recipe not in LAST_TOKENS:
        raise FastlockError(f"recipe {recipe!r}: there is none of that name. Take one of {', '.join(LAST_TOKENS)}.")
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


def _check_number(name: str, value: int, low: int, high: int, of: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FastlockError(f"{name} is {value!r}; it must be a whole number from {low} to {high}{of}.")


def _check_heads(heads: int, num_layers: int, num_heads: int) -> None:
    _check_number("heads", heads, 1, num_layers * num_heads, f" (the model has {num_layers} layers of {num_heads})")


def _check_base(model: nn.Module, all_sites: Sequence[Site]) -> None:
    name = type(model).__name__
    if receipt_of(model) is not None:
        raise FastlockError(
            f"{name} is relocked, and a lock comes from the base without one. Unlock it first: fastlock.unlock(model)."
        )
    if len({id(site.module) for site in all_sites}) < len(all_sites):
        raise FastlockError(
            f"{name}: some of its layers share one output projection, so that a lock on one would act in the others. "
            "Such a model can't be locked."
        )


def _check_tokens(model: nn.Module, ids: Sequence[int], index: int, what: str) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if max(ids) >= vocabulary:
        raise FastlockError(
            f"{what} {index + 1}: the tokenizer gives token {max(ids)}, but {type(model).__name__} has {vocabulary}. "
            "Give the tokenizer that belongs to this model."
        )
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions and len(ids) > positions:
        raise FastlockError(
            f"{what} {index + 1}: makes {len(ids)} tokens, but {type(model).__name__} reads "
            f"{positions} at most. Shorten it, or remove it."
        )


def _no_progress(items: Sequence[Any], _description: str) -> Iterable[Any]:
    return items
