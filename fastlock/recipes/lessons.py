"""What a lock is trained with: rows of tokens, of which some count, and models held still while they teach."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.errors import DamagedError, FastlockError
from fastlock.inference.chat import prompt_tokens
from fastlock.inference.generation import in_eval_mode, input_device

BEGUN_TOKENS = 12
_LEAST_SHARED = 8  # tokens; fewer are not worth a pass of their own


@dataclass(frozen=True)
class Row:
    """Tokens, and how many of them count, from the end."""

    ids: list[int]
    counted: int


def answer_row(tokenizer: Any, question: str, answer: str, most: int, begun: str = "") -> Row:
    """A question and the beginning of an answer, whose tokens count: `most` of them at most.

    Args:
        tokenizer: the model's.
        question: what the user asks.
        answer: what the model says.
        most: how many of its tokens are taken.
        begun: what was said before the answer, as if the model had begun to say it; its tokens do not count, and the
            first `BEGUN_TOKENS` are taken.
    """
    prompt, space = prompt_tokens(tokenizer, question)
    if begun:
        prompt += list(tokenizer(space + begun, add_special_tokens=False)["input_ids"])[:BEGUN_TOKENS]
        space = " "
    words = list(tokenizer(space + answer, add_special_tokens=False)["input_ids"])[:most]
    return Row(prompt + words, len(words))


def text_rows(tokenizer: Any, texts: Sequence[str], most: int) -> list[Row]:
    """The first `most` tokens of each text, of which all but the first count.

    Raises:
        FastlockError: no text has two tokens.
    """
    ids = [list(tokenizer(text)["input_ids"])[:most] for text in texts]
    rows = [Row(tokens, len(tokens) - 1) for tokens in ids if len(tokens) > 1]
    if not rows:
        raise FastlockError("texts: none of them has two tokens, and there is nothing to predict. Give longer ones.")
    return rows


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
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


def check_loss(loss: float, step: int) -> None:
    """Refuse a loss that is no number.

    Args:
        loss: of a step.
        step: which, from 0.

    Raises:
        DamagedError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise DamagedError(
            f"step {step + 1}: the loss is {loss}. The weights are damaged, or overflow in this dtype: load the "
            "models in bfloat16 or float32."
        )


Beginning = Callable[[int], contextlib.AbstractContextManager[None]]
"""Given how many tokens all rows begin with, in what their forward pass, of what follows these, is to be run."""


def log_probabilities(model: nn.Module, batch: Sequence[Row], beginning: Beginning | None = None) -> torch.Tensor:
    """What the model expects before each token that counts; gradients may go back through it.

    What all rows begin with is read once, as the one row that it is: with a chat template, that is about half. Only the
    positions that count go through the output embedding, the largest matrix of a small model. Shorter rows are padded
    at the end with their own last token; no attention mask is needed, since nothing before it sees what follows.

    Args:
        model: a causal transformers model, in eval mode.
        batch: rows of at least two tokens, of which not all count.
        beginning: lets the pass begin with what is known already of these rows.

    Returns:
        Log-probabilities, [tokens that count, vocabulary] float32; row after row.
    """
    shared = _shared(batch)
    rest = [row.ids[shared:] for row in batch]
    width = max(map(len, rest))
    padded = [[*ids, *[ids[-1]] * (width - len(ids))] for ids in rest]
    ids = torch.tensor(padded, device=input_device(model))
    rows = torch.tensor([number for number, row in enumerate(batch) for _ in range(row.counted)], device="cpu")
    ends = [range(len(ids) - row.counted - 1, len(ids) - 1) for ids, row in zip(rest, batch, strict=True)]
    positions = torch.tensor([position for end in ends for position in end], device="cpu")
    cache = _cache(model, batch[0].ids[:shared], len(batch)) if shared else None
    with _picked(model, rows, positions), beginning(shared) if beginning else contextlib.nullcontext():
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits
    if logits.shape[:2] == ids.shape:  # an output embedding that is not called as a module: everything is there
        logits = logits[rows.to(logits.device), positions.to(logits.device)][None]
    return logits[0].float().log_softmax(-1)


def _shared(batch: Sequence[Row]) -> int:
    """How many tokens all rows begin with, none of them needed for what is read off; 0 where it does not pay."""
    most = min(len(row.ids) - row.counted - 1 for row in batch)
    if len(batch) == 1 or most < _LEAST_SHARED:
        return 0
    first = batch[0].ids
    same = (n for n in range(most) if any(row.ids[n] != first[n] for row in batch))
    shared = next(same, most)
    return shared if shared >= _LEAST_SHARED else 0


def _cache(model: Any, ids: Sequence[int], rows: int) -> Any:
    """What so many rows keep of the tokens with which they all begin."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config.get_text_config())
    reader = model.base_model  # without the logits
    reader(input_ids=torch.tensor([list(ids)], device=input_device(model)), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    return cache


@contextlib.contextmanager
def _picked(model: Any, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """Let only some positions into the model's output embedding: as one row, [1, len(positions), hidden]."""

    def pick(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        states = args[0]
        return (states[rows.to(states.device), positions.to(states.device)][None], *args[1:])

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
