"""DoRA: y = m / ‖W + s B A‖ ⊙ (W x + s B A x) + c, norms by row (arXiv 2402.09353).

The norms take all of W, not only the locked columns.
"""

from __future__ import annotations

import torch

from fastlock.checkpoints.adapters.methods.lora import lora_operands
from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, stored
from fastlock.checkpoints.adapters.methods.products import displaced, times

# Rows of W that are summed with those of B A at a time.
_ROWS = 512


def dora(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    operands = lora_operands(at)
    magnitude = stored(at, "lora_magnitude_vector", (at.site.hidden_size,))
    a, b, weight = operands.a.double(), operands.b.double(), at.whole_weight()
    norms = torch.cat(
        [
            torch.linalg.vector_norm(rows + operands.scale * (of_b @ a), dim=1)
            for rows, of_b in zip(weight.split(_ROWS), b.split(_ROWS), strict=True)
        ]
    )
    lora = at.base_part + operands.scale * times(operands.b, displaced(at, operands.a))
    shift = magnitude.double() / norms * lora
    return Effect(shift, "added", operands.scale, operands.peft_scale, (operands.a, operands.b, magnitude))
