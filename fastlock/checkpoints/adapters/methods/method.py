"""What a method is given of an adapter at one output projection, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fastlock.checkpoints.adapters.adapter import Adapter
from fastlock.checkpoints.checkpoint import StoredSite
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.locks.lock import Displacement

# How a stack scales a LoRA: PEFT's rule, which transformers and vLLM follow; α / r of the config, whatever else it
# says (SGLang); α of the config over the rank of the tensors (llama.cpp).
Scaling = Literal["peft", "sglang", "llama.cpp"]
SCALINGS: tuple[Scaling, ...] = ("peft", "sglang", "llama.cpp")

# What an adapter does with its base's projection W x + c. "untouched": leaves it alone. "added": adds to W x + c what
# does not depend on c. "scaled": a linear map of all of W x + c. "replaced": has a projection of its own instead.
Action = Literal["untouched", "added", "scaled", "replaced"]


@dataclass(frozen=True, eq=False)
class AdaptedSite:
    """An adapter at one locked output projection of its base.

    Attributes:
        adapter: the adapter.
        site: the projection, as the base stores it.
        path: of the projection, as the adapter names it.
        parameters: what the adapter stores of it, by what PEFT calls the parameter.
        displacement: of the lock, in this layer.
        base_part: W d, [hidden] float64.
        whole_weight: reads W, [hidden, num_heads * head_dim] float64.
        scaling: the scale rule to follow.
    """

    adapter: Adapter
    site: StoredSite
    path: str
    parameters: Mapping[str, StoredTensor]
    displacement: Displacement
    base_part: torch.Tensor
    whole_weight: Callable[[], torch.Tensor]
    scaling: Scaling

    @property
    def where(self) -> str:
        """The adapter and its module, for messages."""
        return f"{self.adapter.where}: {self.path}"

    @property
    def width(self) -> int:
        """The length of the projection's input."""
        return self.site.num_heads * self.site.head_dim


@dataclass(frozen=True, eq=False)
class Effect:
    """What a lock's displacement does to the output of an adapted projection.

    Attributes:
        shift: f = layer(d) - layer(0), [hidden] float64.
        action: what the adapter does with the base's projection.
        scale: s as the scale rule has it, None where the method has none.
        peft_scale: s as PEFT has it.
        read: the tensors that were read for it, in an order that does not change.
    """

    shift: torch.Tensor
    action: Action
    scale: float | None
    peft_scale: float | None
    read: tuple[torch.Tensor, ...]


# How a method shifts an output.
Method = Callable[[AdaptedSite], Effect]
