"""Rows of tokens through a model in batches: like lengths together, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlock.activations import Progress, input_device
from fastlock.memory import in_halves

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
    """The greedy continuation of each row."""
    width, device = max(map(len, batch)), input_device(model)
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    pad = 0 if pad is None else pad
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    go_on: Any = model.generate
    out = go_on(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    texts: list[str] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


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


def row_name(row: Row) -> str:
    """What a row is called in a message."""
    return f"one prompt of {len(row)} tokens"
