"""Rows of tokens through a model in batches: like lengths together, halved when memory runs out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.inference.batching import in_halves
from fastlock.models.sites import text_config
from fastlock.recipes.activations import Progress, input_device

Row = list[int]
T = TypeVar("T")


def in_batches(
    rows: Sequence[Row], work: Callable[[Sequence[Row]], list[T]], batch_size: int, progress: Progress, what: str
) -> list[T]:
    """What `work` makes of each row, in the rows' order; batches of like lengths need the least padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    done: dict[int, T] = {}
    for start in progress(range(0, len(order), batch_size), what):
        batch = order[start : start + batch_size]
        done |= zip(batch, in_halves([rows[i] for i in batch], work, row_name), strict=True)
    return [done[i] for i in range(len(rows))]


def generate(model: nn.Module, tokenizer: Any, batch: Sequence[Row], new_tokens: int) -> list[str]:
    """The greedy continuation of each row, whatever the model's generation_config says but for where an answer ends."""
    width, device = max(map(len, batch)), input_device(model)
    ends = _ends(model)
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, *ends]
    pad = next((token for token in known if token is not None and 0 <= token < vocabulary(model)), 0)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    go_on: Any = model.generate
    with _greedily(model, new_tokens, pad, ends) as config:
        out = go_on(input_ids=ids, attention_mask=mask, generation_config=config)
    # What stands behind an answer's end is padding.
    answers = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in out[:, width:].tolist()]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _ends(model: nn.Module) -> list[int]:
    """The tokens that end an answer."""
    held: Any = getattr(model, "generation_config", None)
    ends = getattr(held, "eos_token_id", None)
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else list(map(int, ends))


@contextlib.contextmanager
def _greedily(model: nn.Module, new_tokens: int, pad: int, ends: list[int]) -> Iterator[Any]:
    """A config of greedy decoding. Held by the model, too: `generate` takes from there what a config leaves open."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None
    )
    holder: Any = model
    held = holder.generation_config
    holder.generation_config = config
    try:
        yield config
    finally:
        holder.generation_config = held


def losses(model: nn.Module, batch: Sequence[Row]) -> list[float]:
    """The negative log-likelihood of each row after its first token. Padding goes behind, where no token sees it."""
    width, device = max(map(len, batch)), input_device(model)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for row, of_row in zip(batch, logits, strict=True):
        predicted = of_row[: len(row) - 1].float()  # one row at a time: the logits are the largest thing in memory
        targets = torch.tensor(row[1:], device=predicted.device)
        found.append(float(nn.functional.cross_entropy(predicted, targets, reduction="sum")))
    return found


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return rows


def positions(model: nn.Module) -> int | None:
    """How many tokens a model reads at most; None where its config does not say."""
    found: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return found or None


def check_row(model: nn.Module, row: Sequence[int], name: str, new_tokens: int = 0) -> None:
    """Refuse a row of no tokens, of a token that the model does not know, or that leaves no room for an answer."""
    if not row:
        raise FastlockError(f"{name}: the tokenizer makes no tokens of it. Remove it.")
    if not 0 <= min(row) <= max(row) < vocabulary(model):
        raise FastlockError(
            f"{name}: the tokenizer gives token {max(row)}, but {type(model).__name__} has {vocabulary(model)}. Give "
            "the tokenizer that belongs to this model."
        )
    most = positions(model)
    if most is not None and len(row) + new_tokens > most:
        answer = f", and {new_tokens} are to follow" if new_tokens else ""
        shorter = ", or ask for shorter answers (--new-tokens)" if new_tokens else ""
        raise FastlockError(
            f"{name}: makes {len(row)} tokens{answer}, but {type(model).__name__} reads {most} at most. Shorten or "
            f"remove it{shorter}."
        )


def row_name(row: Row) -> str:
    """What a row is called in a message."""
    return f"one prompt of {len(row)} tokens"
