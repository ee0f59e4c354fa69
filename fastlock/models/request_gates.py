"""The gates of locks per request, y = W (x + s·U Vᵀ x) + c: in plain torch, beside the op for their constant parts.

x (W U Vᵀ)ᵀ = (x V) (W U)ᵀ, and W U is computed once a lock. What a row reads of its own x is weighted with the strength
of its lock, or with 0 where the gate is another lock's. torch.compile traces it, and CUDA graphs capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from fastlock.locks.gate import Gate

# Of all ranks of all locks of one layer: readers and writers at strength 1, [ranks, width] float32 each; the number of
# the lock, [ranks] int32; and W U, [ranks, hidden] float32.
GATE_TABLES = ("readers", "writers", "lock_of_rank", "written")


def gate_tables(gates: Sequence[Gate | None], width: int, hidden: int) -> dict[str, torch.Tensor]:
    """The tables of one layer, on the CPU, W U left at zeros; empty where no lock has a gate.

    Args:
        gates: of each lock at strength 1; None for a lock without one here.
        width: num_heads * head_dim.
        hidden: how many rows W has.
    """
    there = [(number, gate) for number, gate in enumerate(gates) if gate is not None]
    if not there:
        return {}
    dense = [gate.dense(width) for _, gate in there]
    lock_of_rank = [number for number, gate in there for _ in range(gate.rank)]
    return {
        "readers": torch.cat([readers.T for readers, _ in dense]).float(),
        "writers": torch.cat([writers.T for _, writers in dense]).float(),
        "lock_of_rank": torch.tensor(lock_of_rank, dtype=torch.int32, device="cpu"),
        "written": torch.zeros(len(lock_of_rank), hidden, device="cpu"),
    }


def written_by(weight: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
    """W U of each rank, [ranks, hidden] float32: summed in float64, rounded once.

    Args:
        weight: W, [hidden, width].
        writers: U, [ranks, width].
    """
    # Some rows at a time: in float64 all of W would be four times as large.
    sums = [writers.double() @ rows.double().T for rows in weight.detach().split(1024)]
    return torch.cat(sums, dim=1).float()


def with_gates(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tables: dict[str, torch.Tensor],
    lock_of_row: torch.Tensor,
    strength_of_row: torch.Tensor,
) -> torch.Tensor:
    """What the gates add to y, each to the rows of its lock; other rows stay as they are, bit for bit.

    It has gradients for x, y and, where one is asked for, W: then through W itself rather than through W U.

    Args:
        y: [..., hidden], the projection of x with the constant parts.
        x: [..., width].
        weight: W, [hidden, width].
        tables: as `gate_tables` made them, W U filled in, on x's device.
        lock_of_row, strength_of_row: as of `fastlock::locked_linear`, [entries].
    """
    entries, width = lock_of_row.shape[0], x.shape[-1]
    of_entry = x.numel() // width // entries
    wide = torch.promote_types(x.dtype, torch.float32)
    own = lock_of_row[:, None] == tables["lock_of_rank"]  # [entries, ranks]
    strengths = torch.where(own, strength_of_row[:, None], 0.0).to(wide)
    read = x.reshape(entries, of_entry, width).to(wide) @ tables["readers"].to(wide).T
    read = read * strengths[:, None]
    if torch.is_grad_enabled() and weight.requires_grad:
        added = functional.linear(read @ tables["writers"].to(wide), weight.to(wide))
    else:
        added = read @ tables["written"].to(wide)
    plain = y.reshape(entries, of_entry, y.shape[-1])
    gated = (plain + added).to(y.dtype)
    return torch.where(own.any(1)[:, None, None], gated, plain).reshape(y.shape)
