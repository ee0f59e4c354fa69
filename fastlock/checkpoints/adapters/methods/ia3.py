"""IA³: y = W (l ⊙ x) + c where the module is one of the config's feedforward ones, else y = l ⊙ (W x + c).

arXiv 2205.05638. The shape of l tells which: [1, in] or [out, 1].
"""

from __future__ import annotations

from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, check_only_peft, stored_as_any
from fastlock.kernels.fold.reference import exact_fold


def ia3(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    check_only_peft(at)
    scaled = stored_as_any(at, "ia3_l", ((1, at.width), (at.site.hidden_size, 1)))
    l = scaled.double().flatten()  # noqa: E741 (the paper's)
    if scaled.shape[0] == at.site.hidden_size and scaled.shape[1] == 1:
        return Effect(l * at.base_part, "scaled", None, None, (scaled,))
    displacement, head_dim = at.displacement, at.site.head_dim
    of_heads = l.view(-1, head_dim)[list(displacement.heads)]
    shift = exact_fold(at.columns(), displacement.values * of_heads)
    return Effect(shift, "added", None, None, (scaled,))
