"""LoRA: y = W x + c + s (B A x + β), whose β is the bias that `lora_bias` adds (arXiv 2106.09685).

f = W d + s B (A d): only the locked columns of W and of A meet the displacement. s is α / r, or α / √r with
`use_rslora` (arXiv 2312.03732), and r and α may be a module's own. MiCA, VeLoRA and MonteCLoRA are trained otherwise,
and served like this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlock.checkpoints.adapters.methods.lora_scales import alpha_in, peft_scale, rank_in, stack_scale
from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, damaged, number, stored
from fastlock.checkpoints.adapters.methods.products import displaced, times


@dataclass(frozen=True, eq=False)
class LoraOperands:
    """What the fold of a LoRA at one output projection takes.

    Attributes:
        a: A, [r, num_heads * head_dim], in the dtype of the file.
        b: B, [hidden, r], in the dtype of the file.
        scale: s as the scale rule has it.
        peft_scale: s as PEFT has it.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    peft_scale: float


def plain_lora(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    operands = lora_operands(at)
    shift = at.base_part + operands.scale * times(operands.b, displaced(at, operands.a))
    return Effect(shift, "added", operands.scale, operands.peft_scale, (operands.a, operands.b))


def lora_operands(at: AdaptedSite) -> LoraOperands:
    """Read A and B of one output projection, and say what they are scaled by.

    Raises:
        DamagedError: they disagree with each other, or with the config.
        MismatchError: they are of a projection of another shape.
        UnsupportedError: they are of a dtype that fastlock does not read.
    """
    rank = _rank(at)
    a, b = at.parameters.get("lora_A.weight"), at.parameters.get("lora_B.weight")
    if a is not None and b is not None and (a.shape[:1], b.shape[1:]) != ((rank,), (rank,)):
        raise damaged(
            at,
            f"A is {list(a.shape)} and B {list(b.shape)}, but its config says rank {rank}. They do not belong together",
        )
    read_a = stored(at, "lora_A.weight", (rank, at.width))
    read_b = stored(at, "lora_B.weight", (at.site.hidden_size, rank))
    peft_scale = _peft_scale(at, rank)
    return LoraOperands(read_a, read_b, _scale(at, rank, peft_scale), peft_scale)


def _rank(at: AdaptedSite) -> int:
    rank = rank_in(at.adapter.config, at.path, at.adapter.where)
    if type(rank) is not int or rank <= 0:
        raise damaged(at, f"its config gives the rank {str(rank)[:40]!a}")
    return rank


def _scale(at: AdaptedSite, rank: int, peft_scale: float) -> float:
    """s as the scale rule has it."""
    if at.scaling == "peft":
        return peft_scale
    alpha, whole = number(at.adapter.config.get("lora_alpha"), at), 0.0
    if at.scaling == "sglang" and (whole := number(at.adapter.config.get("r"), at)) <= 0:
        raise damaged(at, f"its config gives the rank {whole:g}")
    return stack_scale(at.scaling, alpha, whole, rank)


def _peft_scale(at: AdaptedSite, rank: int) -> float:
    config = at.adapter.config
    return peft_scale(config, number(alpha_in(config, at.path, at.adapter.where), at), rank)
