"""VeRA: y = W x + c + b ⊙ (B (λ ⊙ (A x))), with one A and one B for all modules (arXiv 2310.11454).

They are as large as the largest module asks for, and each module uses the first rows and columns. Where the adapter
does not store them they come from a seed, which is PEFT's to do.
"""

from __future__ import annotations

from fastlock.checkpoints.adapters.methods.by_peft import by_peft
from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, check_only_peft, damaged, stored
from fastlock.checkpoints.adapters.methods.products import displaced, times


def vera(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    check_only_peft(at)
    shared = at.adapter.modules.get("", {})
    if "vera_A" not in shared or "vera_B" not in shared:
        return by_peft(at)
    hidden, shapes = at.site.hidden_size, (shared["vera_A"].shape, shared["vera_B"].shape)
    rank = at.adapter.config.get("r")
    if [len(shape) for shape in shapes] != [2, 2] or not shapes[0][0] == shapes[1][1] == rank:
        raise damaged(
            at,
            f"vera_A is {list(shapes[0])} and vera_B {list(shapes[1])}, but its config says rank {str(rank)[:40]!a}",
        )
    if shapes[0][1] < at.width or shapes[1][0] < hidden:
        raise damaged(at, f"vera_A is {list(shapes[0])} and vera_B {list(shapes[1])}, too small for this module")
    over_rank = stored(at, "vera_lambda_d", (rank,))
    over_output = stored(at, "vera_lambda_b", (hidden,))
    a, b = at.adapter.read(shared["vera_A"]), at.adapter.read(shared["vera_B"])
    inner = over_rank.double() * displaced(at, a)
    shift = at.base_part + over_output.double() * times(b[:hidden], inner)
    return Effect(shift, "added", None, None, (a, b, over_rank, over_output))
