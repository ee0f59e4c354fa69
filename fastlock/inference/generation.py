"""A model run over a batch of rows of tokens: greedy answers, losses, and the modes in which both are measured."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastlock.inference.batching import Row
from fastlock.inference.chat import vocabulary


def generate(model: nn.Module, tokenizer: Any, batch: Sequence[Row], new_tokens: int) -> list[str]:
    """The greedy continuation of each row.

    Of the model's generation_config, only the tokens that end an answer count.

    Args:
        model: a transformers model that generates.
        tokenizer: its tokenizer.
        batch: the rows, of any lengths; they are padded on the left.
        new_tokens: how long a continuation may be.

    Returns:
        The text of each continuation, up to its end, without special tokens.
    """
    width, device = max(map(len, batch)), input_device(model)
    ends = _ends(model)
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id, *ends]
    pad = next((token for token in candidates if token is not None and 0 <= token < vocabulary(model)), 0)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    model_generate: Any = model.generate
    with _greedy_config(model, new_tokens, pad, ends) as config:
        out = model_generate(input_ids=ids, attention_mask=mask, generation_config=config)
    # What follows an answer's end is padding.
    answers = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in out[:, width:].tolist()]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _ends(model: nn.Module) -> list[int]:
    """The tokens that end an answer."""
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else list(map(int, ends))


@contextlib.contextmanager
def _greedy_config(model: nn.Module, new_tokens: int, pad: int, ends: list[int]) -> Iterator[Any]:
    """A config of greedy decoding, which the model holds too: `generate` takes from there what a config leaves open."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None
    )
    holder: Any = model
    original = holder.generation_config
    holder.generation_config = config
    try:
        yield config
    finally:
        holder.generation_config = original


def losses(model: nn.Module, batch: Sequence[Row]) -> list[float]:
    """The negative log-likelihood of each row after its first token, in nats.

    Args:
        model: a transformers model with logits.
        batch: rows of at least one token; they are padded on the right, where no token sees it.
    """
    width, device = max(map(len, batch)), input_device(model)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    sums = []
    for row, row_logits in zip(batch, logits, strict=True):
        predicted = row_logits[: len(row) - 1].float()  # a row at a time: the logits are the largest thing in memory
        targets = torch.tensor(row[1:], device=predicted.device)
        sums.append(float(nn.functional.cross_entropy(predicted, targets, reduction="sum")))
    return sums


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode; afterwards, each is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, without gradients; afterwards, each is in its own mode again."""
    with in_eval_mode(model), torch.no_grad():
        yield


def input_device(model: nn.Module) -> torch.device:
    """The device for tokens; for a model whose embedding is offloaded, accelerate's hooks move them on from the CPU."""
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.device("cpu") if embedding.device.type == "meta" else embedding.device
