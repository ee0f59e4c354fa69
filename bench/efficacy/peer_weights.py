"""What changes a fine-tune's weights once, and reads examples for it: Antidote and NLSR, each in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlock.inference.chat import prompt_tokens

Exchanges = Sequence[tuple[str, str]]


@torch.no_grad()
def antidote(model: Any, base: Any, tokenizer: Any, harmful: Exchanges, ratio: float) -> Any:
    """Antidote (arXiv 2408.09600): after fine-tuning, prune the weights that matter most to harmful answers.

    Wanda's score of a weight is |w_ij| · ‖x_j‖₂ over harmful questions with harmful answers; in each matrix the highest
    `ratio` of them are pruned (the paper's α; its code takes 0.1). The authors prune the weights of the LoRA that was
    trained. Here they are the fine-tune's own part of each matrix, w less the base's, so that full fine-tunes can be
    pruned too, and what is pruned goes back to the base's.

    Args:
        model: the fine-tune, which is changed.
        base: the aligned model that it was made from.
        harmful: questions with harmful answers.
        ratio: how many of each matrix's weights are pruned, 0 to 1.
    """
    squares: dict[str, torch.Tensor] = {}

    def look(name: str, x: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0) + x.square().sum(0)

    _read(model, tokenizer, harmful, look)
    aligned = dict(base.named_modules())
    for name, square in squares.items():
        mine, safe = model.get_submodule(name).weight, aligned[name].weight
        scores = ((mine - safe).float().abs() * square.sqrt()).flatten()
        pruned = scores.topk(round(ratio * scores.numel())).indices
        mine.view(-1)[pruned] = safe.flatten()[pruned]
    return model


@torch.no_grad()
def nlsr(
    model: Any,
    base: Any,
    unaligned: Any,
    tokenizer: Any,
    refusals: Exchanges,
    *,
    beta: float = 0.9,
    rank: int = 16,
    critical: float = 0.2,
    replaced: float = 0.5,
) -> Any:
    """NLSR (arXiv 2412.12497): transplant the neurons that matter to safety where fine-tuning turned them.

    1. The reference is the aligned model, amplified: W_e = W_a + β (W_a − W_u) (the authors' code takes β = 0.9).
    2. The part of W_e − W_u that acts on refusals is reduced to its main directions, Π = U_r U_rᵀ (W_e − W_u), with the
       left singular vectors U_r of (W_e − W_u) X. Safety-critical are the neurons (rows) with the longest rows of Π, a
       share `critical` of each matrix (the code keeps 20 %).
    3. A matrix's similarity is the cosine of W − W_u and W_e − W_u over its critical neurons. In the share `replaced`
       of the matrices in which it is lowest, these neurons become the reference's (the code: 50 %).

    The authors do this to the matrices A and B of a LoRA, choose single weights, and draw which matrices are replaced
    with probabilities that fall linearly with the similarity, 0.5 ± 0.2. Here it is done to merged weights and whole
    neurons, and without chance.

    Args:
        model: the fine-tune, which is changed.
        base: the aligned model that it was made from.
        unaligned: what that was before it was aligned.
        refusals: harmful questions with refusals.
    """
    moments: dict[str, torch.Tensor] = {}

    def look(name: str, x: torch.Tensor) -> None:
        moments[name] = moments.get(name, 0) + x.T @ x

    _read(base, tokenizer, refusals, look)
    patches = []
    for name, moment in moments.items():
        mine, safe, unsafe = (m.get_submodule(name).weight for m in (model, base, unaligned))
        update = ((1 + beta) * (safe - unsafe)).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            top, _, _ = torch.svd_lowrank(update @ moment @ update.T, q=min(rank, len(update)), niter=4)
        length = (top @ (top.T @ update)).norm(dim=1)
        rows = length.topk(max(1, round(critical * len(length)))).indices
        both = (mine - unsafe).float()[rows].flatten(), update[rows].flatten()
        similarity = torch.nn.functional.cosine_similarity(*both, dim=0)
        patches.append((float(similarity), mine, rows, (unsafe[rows] + update[rows]).to(mine.dtype)))
    patches.sort(key=lambda patch: patch[0])
    for _, mine, rows, reference in patches[: round(replaced * len(patches))]:
        mine[rows] = reference
    return model


def _read(model: Any, tokenizer: Any, exchanges: Exchanges, look: Callable[[str, torch.Tensor], None]) -> None:
    """Let a model read questions with answers, and look at what enters each projection of its layers, [tokens, in]."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":

            def seen(_module: Any, args: Any, name: str = name) -> None:
                look(name, args[0][0].float())

            hooks.append(module.register_forward_pre_hook(seen))
    try:
        for question, answer in exchanges:
            prompt, space = prompt_tokens(tokenizer, question)
            words = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
            model(torch.tensor([[*prompt, *words]]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
