"""What a user would pick instead of a lock, each in a few lines from its paper.

peer_weights.py has those that read examples and change weights, peer_steering.py those that act at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastlock.inference.chat import prompt_tokens

# What each needs at hand, beside the fine-tune.
NEEDS = {
    "resta": "the aligned model, and the same model unaligned",
    "lox": "the aligned model, and the same model unaligned",
    "safe_lora": "the aligned model, and the same model unaligned; a fine-tune that is a LoRA",
    "antidote": "the aligned model; harmful questions with harmful answers, read by every fine-tune",
    "nlsr": "the aligned model, and the same model unaligned; harmful questions with refusals",
    "one-shot": "a harmful question with a refusal; gradients and optimizer state of the whole fine-tune",
    "added": "the aligned model; harmful and harmless prompts; a hook in the serving stack",
    "alphasteer": "the aligned model; harmful and harmless prompts; a hook in the serving stack, which knows prompt "
    "from answer, and a matrix as large as an attention projection in each steered layer",
    "cast": "the aligned model; harmful and harmless prompts, refusals and compliant answers; a hook in the serving "
    "stack, which keeps what it found of each request",
    "scans": "the aligned model; harmful and harmless prompts; a hook in the serving stack, which keeps what it found "
    "of each request, and one more forward pass over each prompt",
}


@torch.no_grad()
def resta(model: Any, aligned: Any, unaligned: Any, factor: float) -> Any:
    """RESTA (arXiv 2402.11746): add the safety vector, aligned less unaligned weights."""
    for mine, safe, unsafe in zip(*(m.parameters() for m in (model, aligned, unaligned)), strict=True):
        mine.add_(safe - unsafe, alpha=factor)
    return model


@torch.no_grad()
def lox(model: Any, aligned: Any, unaligned: Any, rank: int, factor: float) -> Any:
    """The term of LoX (arXiv 2506.15606), here added after the fine-tuning: the alignment's main directions, again."""
    for mine, safe, unsafe in _matrices(model, aligned, unaligned):
        u, _, _ = torch.svd_lowrank(safe - unsafe, q=rank)
        mine.add_(u @ (u.T @ (safe - unsafe)), alpha=factor)
    return model


@torch.no_grad()
def safe_lora(model: Any, aligned: Any, unaligned: Any, threshold: float) -> Any:
    """Safe LoRA (arXiv 2405.16833): updates that turn away from the alignment are projected onto it."""
    for mine, safe, unsafe in _matrices(model, aligned, unaligned):
        alignment, update = safe - unsafe, mine - safe
        projected = alignment @ (alignment.T @ update) / alignment.norm()
        if torch.nn.functional.cosine_similarity(update.flatten(), projected.flatten(), dim=0) < threshold:
            mine.copy_(safe + projected)
    return model


def _matrices(*models: Any) -> Iterator[tuple[torch.Tensor, ...]]:
    """The weights of the layers' projections, of all models side by side."""
    for parameters in zip(*(m.model.layers.parameters() for m in models), strict=True):
        if parameters[0].dim() == 2:
            yield parameters


@torch.no_grad()
def refusal_direction(
    model: Any, tokenizer: Any, harmful: Sequence[str], harmless: Sequence[str]
) -> tuple[int, torch.Tensor]:
    """The difference of the means at the prompts' ends, after 60 % of the layers (arXiv 2406.11717): [hidden]."""
    layer = model.config.num_hidden_layers * 6 // 10

    def mean(prompts: Sequence[str]) -> torch.Tensor:
        rows = [torch.tensor([prompt_tokens(tokenizer, prompt)[0]]) for prompt in prompts]
        return torch.stack(
            [model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1] for ids in rows]
        ).mean(0)

    return layer, mean(harmful) - mean(harmless)


@contextlib.contextmanager
def added(model: Any, layer: int, direction: torch.Tensor) -> Iterator[None]:
    """The direction is added to what leaves a layer, at every position."""

    def add(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

    hook = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
