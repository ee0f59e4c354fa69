"""What a method is given of an adapter at one output projection, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastlock.checkpoints.adapters.adapter import ADAPTER_AGAIN, Adapter
from fastlock.checkpoints.checkpoint import StoredSite
from fastlock.checkpoints.tensor_index import StoredTensor
from fastlock.errors import DamagedError, MismatchError, UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Displacement

# How a stack scales a LoRA: PEFT's rule, which transformers and vLLM follow; α / r of the config, whatever else it
# says (SGLang); α of the config over the rank of the tensors (llama.cpp).
Scaling = Literal["peft", "sglang", "llama.cpp"]
SCALINGS: tuple[Scaling, ...] = ("peft", "sglang", "llama.cpp")

# What an adapter does with its base's projection W x + c. "untouched": leaves it alone. "added": adds to W x + c what
# does not depend on c. "scaled": a linear map of all of W x + c. "replaced": has a projection of its own instead.
Action = Literal["untouched", "added", "scaled", "replaced"]

# No config has a larger number, and a float holds every whole one below it.
MAX_NUMBER = 2**53


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
        columns: reads the locked columns of W.
        whole_weight: reads W, [hidden, num_heads * head_dim] float64.
        largest: the longest output and the longest input of all modules that the adapter adapts.
        scaling: the scale rule to follow.
    """

    adapter: Adapter
    site: StoredSite
    path: str
    parameters: Mapping[str, StoredTensor]
    displacement: Displacement
    base_part: torch.Tensor
    columns: Callable[[], HeadColumns]
    whole_weight: Callable[[], torch.Tensor]
    largest: Callable[[], tuple[int, int]]
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


def stored(at: AdaptedSite, name: str, shape: Sequence[int]) -> torch.Tensor:
    """One of the adapter's parameters at this projection, in the dtype of the file.

    Raises:
        DamagedError: it is not there, or its shape is none that any projection has.
        MismatchError: its shape is that of another projection.
        UnsupportedError: fastlock does not read its dtype.
    """
    return stored_as_any(at, name, (tuple(shape),))


def stored_as_any(at: AdaptedSite, name: str, shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """As `stored`, where a parameter may have one of several shapes."""
    tensor = at.parameters.get(name)
    if tensor is None:
        raise damaged(at, f"has no {name}")
    if tensor.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise MismatchError(
            f"{at.where}: {name} is {list(tensor.shape)}, and over this base it is {expected}. Give the base that the "
            "adapter was trained on, or download the adapter again."
        )
    return at.adapter.read(tensor)


def damaged(at: AdaptedSite, problem: str) -> DamagedError:
    """The error that says what is wrong with the adapter here."""
    return DamagedError(f"{at.where}: {problem}. {ADAPTER_AGAIN}")


def number(value: Any, at: AdaptedSite) -> float:
    """A number of the adapter's config.

    Raises:
        DamagedError: it is none, or none that a float holds exactly.
    """
    if type(value) not in (int, float) or not abs(value) < MAX_NUMBER:
        raise damaged(at, f"its config gives {str(value)[:40]!a} for a number")
    return float(value)


def check_only_peft(at: AdaptedSite) -> None:
    """Refuse the scale rules of stacks that do not serve a method.

    Raises:
        UnsupportedError: another than PEFT's is asked for.
    """
    if at.scaling != "peft":
        raise UnsupportedError(
            f"{at.where}: is of the method {at.adapter.method}, which only PEFT and transformers serve. Fold it for "
            "them, or merge it into its base and relock the result."
        )
