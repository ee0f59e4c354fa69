"""What this process has of a tensor that may lie across many, and sums over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

# How a DTensor lies on its mesh: the mesh, and for each of its dimensions whether the tensor is cut along it. None for
# a plain tensor.
Sharding: TypeAlias = "tuple[Any, tuple[bool, ...]] | None"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: of a DTensor its shard, and what is on its way is waited for."""
    if not is_sharded(tensor):
        return tensor
    described: Any = tensor
    shard: Any = described.to_local()
    wait = getattr(shard, "trigger_wait", None)  # of an AsyncCollectiveTensor
    mine: torch.Tensor = shard if wait is None else wait()
    return mine


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter and _is_dtensor(tensor)


def sharding_of(tensor: torch.Tensor) -> Sharding:
    """How a DTensor lies on its mesh; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    described: Any = tensor
    return described.device_mesh, tuple(placement.is_shard() for placement in described.placements)


def over_shards(number: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """The sum of a number over the ranks that hold different parts of what it was taken of."""
    if sharding is None or not any(sharding[1]):
        return number
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, cut = sharding
    placements = [Partial() if along else Replicate() for along in cut]
    whole: torch.Tensor = DTensor.from_local(number, mesh, placements, run_check=False).full_tensor()
    return whole


def sum_over_shards(sums: Sequence[tuple[torch.Tensor, Sharding]]) -> torch.Tensor:
    """The sum of what some tensors contribute, over all ranks that hold parts of them: one float64, where the first is.

    It is collective, if any of them is a DTensor: every rank must come here.
    """
    by_sharding: dict[Sharding, list[torch.Tensor]] = {}
    for number, sharding in sums:
        by_sharding.setdefault(sharding, []).append(number.double())
    device = sums[0][0].device
    totals = [
        over_shards(torch.stack([number.to(numbers[0].device) for number in numbers]).sum(), sharding)
        for sharding, numbers in by_sharding.items()
    ]
    return torch.stack([total.to(device) for total in totals]).sum()


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")
