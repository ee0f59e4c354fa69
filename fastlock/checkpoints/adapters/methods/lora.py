"""LoRA: y = W x + c + s (B A x + β), whose β is the bias that `lora_bias` adds (arXiv 2106.09685).

f = W d + s B (A d): only the locked columns of W and of A meet the displacement. s is α / r, or α / √r with
`use_rslora` (arXiv 2312.03732), and r and α may be a module's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect
from fastlock.checkpoints.adapters.methods.patterns import value_for
from fastlock.errors import DamagedError, MismatchError
from fastlock.kernels.fold.reference import HeadColumns, exact_fold

_AGAIN = "Download the adapter again."


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


def lora(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    operands, displacement = lora_operands(at), at.displacement
    columns = HeadColumns.in_projection(operands.a, displacement.heads, displacement.head_dim)
    inner = exact_fold(columns, displacement.values)
    outer = exact_fold(HeadColumns(operands.b, (0,)), inner[None])
    shift = at.base_part + operands.scale * outer
    return Effect(shift, "added", operands.scale, operands.peft_scale, (operands.a, operands.b))


def lora_operands(at: AdaptedSite) -> LoraOperands:
    """Read A and B of one output projection, and say what they are scaled by.

    Raises:
        DamagedError: they disagree with each other, or with the config.
        MismatchError: they are of a projection of another shape.
        UnsupportedError: they are of a dtype that fastlock does not read.
    """
    a, b = at.parameters.get("lora_A.weight"), at.parameters.get("lora_B.weight")
    if a is None or b is None:
        missing = "lora_A.weight" if a is None else "lora_B.weight"
        raise DamagedError(f"{at.where}: has no {missing}. {_AGAIN}")
    rank = _rank(at)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise DamagedError(
            f"{at.where}: A is {list(a.shape)} and B {list(b.shape)}, but its config says rank {rank}. They do not "
            f"belong together. {_AGAIN}"
        )
    if (b.shape[0], a.shape[1]) != (at.site.hidden_size, at.width):
        raise MismatchError(
            f"{at.where}: is for a projection of {[b.shape[0], a.shape[1]]}, and the base's is "
            f"{[at.site.hidden_size, at.width]}. Give the base that the adapter was trained on."
        )
    read_a, read_b = at.adapter.read(a), at.adapter.read(b)
    peft_scale = _peft_scale(at, rank)
    return LoraOperands(read_a, read_b, _scale(at, rank, peft_scale), peft_scale)


def _rank(at: AdaptedSite) -> int:
    config = at.adapter.config
    rank = value_for(config.get("rank_pattern"), at.path, config.get("r"), "rank_pattern", at.adapter.where)
    if type(rank) is not int or rank <= 0:
        raise DamagedError(f"{at.where}: its config gives the rank {str(rank)[:40]!a}. {_AGAIN}")
    return rank


def _scale(at: AdaptedSite, rank: int, peft_scale: float) -> float:
    """s as the scale rule has it."""
    if at.scaling == "peft":
        return peft_scale
    alpha = _number(at.adapter.config.get("lora_alpha"), at)
    if at.scaling == "llama.cpp":  # `llama_adapter_lora_weight.get_scale` of llama-adapter.h
        return alpha / rank if alpha else 1.0
    whole = _number(at.adapter.config.get("r"), at)  # `LoRAAdapter.__init__` of sglang/srt/lora/lora.py
    if whole <= 0:
        raise DamagedError(f"{at.where}: its config gives the rank {whole:g}. {_AGAIN}")
    return alpha / whole


def _peft_scale(at: AdaptedSite, rank: int) -> float:
    config = at.adapter.config
    alpha = value_for(config.get("alpha_pattern"), at.path, config.get("lora_alpha"), "alpha_pattern", at.adapter.where)
    return _number(alpha, at) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(value: Any, at: AdaptedSite) -> float:
    if type(value) not in (int, float) or not abs(value) < 2**53:
        raise DamagedError(f"{at.where}: its config gives {str(value)[:40]!a} for a number. {_AGAIN}")
    return float(value)
