"""The recipe "null-space": a gate in closed form, from forward passes of the aligned base alone.

AlphaSteer (arXiv 2506.07022) finds a linear map of the residual stream that is null on benign activations and
reconstructs a refusal direction on malicious ones, and steers with it at run time. Here the map reads and writes the
input x of output projections, is of a small rank, and folds into the weights. While the base reads

    harmful    each pair's question: x at its end, and at the first tokens of its safe and of its unsafe answer
    benign     harmless and scary requests with what the base answers, and ordinary texts: x at every token

it adds one vector a layer, wherever it reads a harmful request: the mean of x at the ends of harmful questions less
that at the ends of harmless ones. A gate of a higher rank adds at the t-th token of an answer something of its own
instead: the mean of x at that token of the safe answers less that of the unsafe ones. gate_solution.py has the rest.
No gradient is needed, and no activation is kept. Of pairs, harmless and scary requests at most 130 each are read,
spread over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fastlock.errors import FastlockError, check_number
from fastlock.evaluation.evaluator import evaluate
from fastlock.evaluation.prompts import Prompts
from fastlock.inference.batching import Progress
from fastlock.inference.chat import check_row, prompt_tokens
from fastlock.locks.lock import Lock
from fastlock.recipes.gate_lock import checked_layers, gated_rows, lock_of
from fastlock.recipes.gate_recipe import GateMaterial, GateRecipe
from fastlock.recipes.gate_solution import solved
from fastlock.recipes.harm_probe import read_probe, spread
from fastlock.recipes.second_moments import GroupedText, Moments, moments_of

RANK, TOKENS = 1, 3
# Of each answer of the base to a harmless request, and of each text, so many tokens are read.
ANSWER_TOKENS, TEXT_TOKENS = 12, 64
# How much the benign texts count, all together, against the harmful ones.
BENIGN = 30.0
# Of the harmful ones, how much the ends of the questions count against the tokens of the answers.
ENDS = 0.5


@dataclass(frozen=True)
class _Groups:
    """The numbers of the groups that tokens are of; the harmful ones come first.

    Group 0 are the ends of the questions, then come the tokens of safe answers, and those of unsafe ones, in order.

    Attributes:
        tokens: how many tokens of each answer are read.
    """

    tokens: int

    @property
    def safe(self) -> range:
        return range(1, 1 + self.tokens)

    @property
    def unsafe(self) -> range:
        return range(1 + self.tokens, 1 + 2 * self.tokens)

    @property
    def harmful(self) -> int:
        """How many groups are harmful."""
        return 1 + 2 * self.tokens

    @property
    def harmless_ends(self) -> int:
        return self.harmful

    @property
    def harmless(self) -> int:
        return self.harmful + 1

    @property
    def texts(self) -> int:
        return self.harmful + 2

    def weights(self) -> list[float]:
        """Of every group in the second moment; those of the harmful ones add up to 1."""
        answers = (1 - ENDS) / (2 * self.tokens)
        return [ENDS] + [answers] * (2 * self.tokens) + [BENIGN / 3] * 3

    def targets(self, means: torch.Tensor, rank: int) -> torch.Tensor:
        """What a gate of some rank should add in each harmful group, [harmful groups, width].

        Args:
            means: of every group.
        """
        end = means[:1] - means[self.harmless_ends : self.harmless_ends + 1]
        if rank == 1:
            return end.expand(self.harmful, -1)
        answers = means[list(self.safe)] - means[list(self.unsafe)]
        return torch.cat([end, answers, answers])


def _lock(
    material: GateMaterial, rank: int | None, tokens: int | None, layers: Iterable[int] | None, progress: Progress
) -> Lock:
    """The lock, a gate alone.

    Raises:
        DamagedError: the model computes NaN or infinite activations.
        FastlockError: a number cannot be used, no layers are told apart, or memory runs out with one text.
    """
    rank, tokens = RANK if rank is None else rank, TOKENS if tokens is None else tokens
    check_number("tokens", tokens, 1, 64)
    check_number("rank", rank, 1, 1 + tokens, f" with {tokens} tokens of each answer")
    chosen = _chosen_layers(material, layers, progress)
    groups, texts = _texts(material, tokens, progress)
    weights = groups.weights()
    gates = {
        layer: _gate(moments, groups, rank, material.sites[layer].name)
        for layer, moments in moments_of(material.base, material.sites, chosen, texts, weights, progress)
    }
    readers, writers = (torch.stack(part).float() for part in zip(*gates.values(), strict=True))
    rows = gated_rows(material.sites[0], list(gates), readers, writers, None)
    recipe = f"null-space: rank {rank} gate, prompts' ends and first {tokens} answer tokens"
    return lock_of(material.base, recipe, material.digest, None, **rows)


def _gate(moments: Moments, groups: _Groups, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """V and U of a layer, [width, rank] float64 each."""
    weights = torch.tensor(groups.weights()[: groups.harmful], dtype=torch.float64, device="cpu")
    means = moments.means[: groups.harmful]
    return solved(moments.second, means, weights, groups.targets(moments.means, rank), rank, name)


def _chosen_layers(material: GateMaterial, layers: Iterable[int] | None, progress: Progress) -> tuple[int, ...]:
    """The layers that are to have a gate, ascending."""
    if layers is None:
        questions = [pair.question for pair in material.pairs]
        probe = read_probe(material.base, material.tokenizer, questions, material.harmless, progress)
        return probe.layers()
    return checked_layers(layers, len(material.sites))


def _texts(material: GateMaterial, tokens: int, progress: Progress) -> tuple[_Groups, list[GroupedText]]:
    """Everything that is read, and the groups of its tokens."""
    pairs = spread(material.pairs)
    safe, unsafe = (
        [_answer(material, pair.question, getattr(pair, kind)) for pair in pairs] for kind in ("safe", "unsafe")
    )
    groups = _Groups(min(tokens, *(max(len(words) for _, words in kind) for kind in (safe, unsafe))))
    if not groups.tokens:
        raise FastlockError("pairs: the tokenizer makes no tokens of their answers. Give others.")
    found = []
    for answers, of in ((safe, groups.safe), (unsafe, groups.unsafe)):
        for number, (prompt, words) in enumerate(answers, start=1):
            read = words[: groups.tokens]
            found.append(_grouped(material, prompt + read, [0, *of[: len(read)]], f"pair {number}"))
    return groups, found + _benign(material, groups, progress)


def _benign(material: GateMaterial, groups: _Groups, progress: Progress) -> list[GroupedText]:
    """The harmless and scary requests that the base answers, with its answers, and the ordinary texts."""
    asked = tuple(dict.fromkeys((*spread(material.harmless), *spread(material.scary))))
    said = evaluate(
        material.base,
        material.tokenizer,
        Prompts(harmless=asked),
        new_tokens=ANSWER_TOKENS,
        batch_size=32,
        progress=progress,
    )[0]
    found = []
    for answer in said.harmless:
        if answer.refused:
            continue
        prompt, words = _answer(material, answer.prompt, answer.text)
        of = [groups.harmless] * (len(prompt) + len(words))
        of[len(prompt) - 1] = groups.harmless_ends
        found.append(_grouped(material, prompt + words, of, f"harmless prompt {answer.prompt[:40]!r}"))
    if not found:
        raise FastlockError(
            "the base refuses all of the harmless requests, and a gate learns from those that it answers. Give others, "
            "or the base that is aligned."
        )
    for number, text in enumerate(material.texts, start=1):
        ids = list(material.tokenizer(text)["input_ids"])[:TEXT_TOKENS]
        found.append(_grouped(material, ids, [groups.texts] * len(ids), f"text {number}"))
    return found


def _answer(material: GateMaterial, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a question, and those of an answer to it."""
    prompt, space = prompt_tokens(material.tokenizer, question)
    return prompt, list(material.tokenizer(space + answer, add_special_tokens=False)["input_ids"]) if answer else []


def _grouped(material: GateMaterial, ids: Sequence[int], groups: Sequence[int], name: str) -> GroupedText:
    check_row(material.base, ids, name)
    return GroupedText(ids, len(groups), name, tuple(groups))


NULL_SPACE = GateRecipe("null-space", _lock)
