"""AdaLoRA: y = W x + c + s B (E ⊙ (A x)), whose ranks were cut while it was trained (arXiv 2303.10512).

PEFT divides α by `init_r` + 1e-5 whatever rank is left (`ranknum` in peft/tuners/adalora/layer.py).
"""

from __future__ import annotations

from typing import Any

from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, check_only_peft, damaged, number, stored
from fastlock.checkpoints.adapters.methods.products import displaced, times


def adalora(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    check_only_peft(at)
    initial = number(at.adapter.config.get("init_r"), at)
    if initial <= 0:
        raise damaged(at, f"its config gives the rank {initial:g}")
    rank = _rank(at, at.adapter.config.get("rank_pattern"), int(initial))
    a = stored(at, "lora_A", (rank, at.width))
    e = stored(at, "lora_E", (rank, 1))
    b = stored(at, "lora_B", (at.site.hidden_size, rank))
    alpha = number(at.adapter.config.get("lora_alpha"), at)
    scale = (alpha if alpha > 0 else float(rank)) / (initial + 1e-5)
    shift = at.base_part + scale * times(b, e.double().flatten() * displaced(at, a))
    return Effect(shift, "added", scale, scale, (a, e, b))


def _rank(at: AdaptedSite, pattern: Any, initial: int) -> int:
    """The rank that is left: how many entries of the module's mask are true."""
    key = f"{at.path}.lora_E"
    if not pattern or (isinstance(pattern, dict) and key not in pattern):
        return initial
    mask = pattern[key] if isinstance(pattern, dict) else None
    if not isinstance(mask, list) or any(type(kept) is not bool for kept in mask):
        raise damaged(at, "its rank_pattern is no list of true and false")
    return sum(mask)
