"""Projections whose weight is quantised in memory: what they share, and those that are not folded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from fastlock.dtypes import BY_TORCH_NAME
from fastlock.errors import UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.projections.stand_in import check_not_replaced

ON_DISK = "Relock its checkpoint on disk instead (fastlock.relock_checkpoint), and load that."


class Dequantised(ABC):
    """A module whose own library can say what W is; the bias is added after its product, in the bias's own dtype.

    So W x + c becomes W x + (c + W d), W being what the module multiplies with. If it quantises its input as well, that
    is exact all the same: d does not pass through it.
    """

    in_place = False

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    @abstractmethod
    def matrix(self) -> torch.Tensor:
        """As of `Projection`: dequantised anew each time it is asked for."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """As of `Projection`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """As of `Projection`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """As of `Projection`."""

    @property
    def bias(self) -> torch.Tensor | None:
        """As of `Projection`: the bias itself, not a copy."""
        bias: torch.Tensor | None = self.module.bias
        return bias

    def head_columns(self, heads: Sequence[int], head_dim: int) -> HeadColumns:
        """As of `Projection`: in float64, so that a fold is rounded once, to the dtype of the bias."""
        matrix = self.matrix
        blocks = [matrix[:, head * head_dim : (head + 1) * head_dim] for head in heads]
        return HeadColumns.side_by_side(torch.cat(blocks, dim=1).double(), head_dim)

    def check(self, name: str) -> None:
        """As of `Projection`."""
        check_not_replaced(self.module, name)
        if any(tensor.device.type == "meta" for tensor in self.module.parameters(recurse=False)):
            raise UnsupportedError(
                f"{name} has no weights in memory (meta device: offloaded to CPU or disk, or not loaded). Load the "
                "model with its locked layers on a device."
            )
        self.check_format(name)
        if self.dtype not in BY_TORCH_NAME.values():
            raise UnsupportedError(f"{name} is quantised, and computes in {self.dtype}. {ON_DISK}")

    @abstractmethod
    def check_format(self, name: str) -> None:
        """Refuse a state that cannot be dequantised exactly as it is served.

        Raises:
            UnsupportedError: it is in one.
        """


def packed_for_a_kernel(module: Any) -> str | None:
    """What a module of GPTQ, AWQ or a serving engine is, told by its tensors and names; None for any other one.

    Their libraries rearrange weights for the kernel that is chosen when they load, some the bias with them (Marlin).
    """
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if "marlin" in name.lower() or any("marlin" in str(key).lower() for key in getattr(module, "__dict__", {})):
        return f"{name}, whose weight and bias Marlin keeps in an order of its own"
    tensors = {**getattr(module, "_parameters", {}), **getattr(module, "_buffers", {})}
    if {"qweight", "qzeros"} & tensors.keys():
        return f"{name}, whose weight is packed for a kernel of GPTQ or AWQ"
    if cls.__name__ in {"FP8Linear", "HQQLinear", "QLinear", "EetqLinear", "BitLinear", "AqlmLinear", "VptqLinear"}:
        return f"{name}, whose weight is quantised in a way that fastlock does not dequantise in memory"
    return None
