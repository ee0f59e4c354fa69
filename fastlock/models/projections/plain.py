"""Plain matrices: `nn.Linear` and what keeps a whole weight and bias as it does, transposed or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock import dtypes
from fastlock.errors import UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.projections.stand_in import check_not_replaced


@dataclass(frozen=True, eq=False)
class Bare:
    """An output projection without its model: the tensors alone.

    Attributes:
        weight: W, [hidden, num_heads * head_dim].
        bias: c, [hidden], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


class Plain:
    """A module whose `weight` is W, and whose `bias` is c or None."""

    in_place = True

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`: the weight itself, not a copy."""
        weight: torch.Tensor = self.module.weight
        return weight.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """As of `Projection`."""
        return tuple(self.matrix.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As of `Projection`."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """As of `Projection`."""
        return self.matrix.device

    @property
    def bias(self) -> torch.Tensor | None:
        """As of `Projection`: the bias itself, not a copy."""
        bias: torch.Tensor | None = self.module.bias
        return bias

    def head_columns(self, heads: Sequence[int], head_dim: int) -> HeadColumns:
        """As of `Projection`."""
        return HeadColumns.in_projection(self.matrix, heads, head_dim)

    def check(self, name: str) -> None:
        """As of `Projection`: the weight is a floating-point matrix that is really there."""
        for check in _CHECKS:
            check(self.module, name)


class Transposed(Plain):
    """transformers' Conv1D (GPT-2): its `weight` is the transpose of W, [num_heads * head_dim, hidden]."""

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`: a view of the weight."""
        return super().matrix.t()


def _check_is_parameter(module: Any, name: str) -> None:
    if isinstance(module, nn.Module) and "weight" not in module._parameters:
        raise UnsupportedError(
            f"{name}.weight is not a parameter, but is computed before each forward pass (pruned or normed, say). Make "
            "it one first, for example with torch.nn.utils.prune.remove(module, 'weight')."
        )


def _check_in_memory(module: Any, name: str) -> None:
    hook = getattr(module, "_hf_hook", None)
    if module.weight.device.type == "meta" or getattr(hook, "offload", False):
        raise UnsupportedError(
            f"{name} has no weights in memory (meta device: offloaded to CPU or disk, or not loaded). "
            "Load the model with its locked layers on a device: a smaller device_map, or more memory."
        )


def _check_is_plain_tensor(module: Any, name: str) -> None:
    weight = module.weight
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.is_sparse:
        raise UnsupportedError(
            f"{name}.weight is a {type(weight).__name__}, not a plain tensor (sharded or quantised). "
            "Gather it, or load the checkpoint unquantised, then relock."
        )


def _check_dtype(module: Any, name: str) -> None:
    dtype = module.weight.dtype
    if dtype not in dtypes.BY_TORCH_NAME.values():
        raise UnsupportedError(
            f"{name}.weight has dtype {dtype}; fastlock folds {dtypes.FOLDABLE}. Quantised models cannot be relocked "
            "yet: load the checkpoint unquantised."
        )


def _check_has_storage(module: Any, name: str) -> None:
    weight = module.weight
    if weight.untyped_storage().nbytes() < _extent(weight):
        raise UnsupportedError(
            f"{name}.weight has no memory behind it: its storage was resized (freed, as sharding libraries do). "
            "Gather the weights, then relock."
        )


def _extent(tensor: torch.Tensor) -> int:
    """How many bytes of its storage a tensor reaches into."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + last + 1) * tensor.element_size())


# In this order: the later ones rely on the earlier ones.
_CHECKS = (
    check_not_replaced,
    _check_is_parameter,
    _check_in_memory,
    _check_is_plain_tensor,
    _check_dtype,
    _check_has_storage,
)
