"""Where tensors are in memory and how they lie there, and whether that is still so; looked up in a few microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Addresses:
    """Of some tensors: their addresses, shapes, strides and dtypes; of some others their addresses alone."""

    def __init__(self, tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor] = ()) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._all = [*self._tensors, *others]
        self._addresses = list(map(torch.Tensor.data_ptr, self._all))
        self._layouts = list(map(_layout, self._tensors))
        self._guard = _guard(self._tensors)

    def moved(self) -> bool:
        """Whether one of them is elsewhere now, or lies there otherwise."""
        if list(map(torch.Tensor.data_ptr, self._all)) != self._addresses:
            return True
        if self._guard is not None and self._guard.check(*self._tensors):
            return False
        # It also compares what does not count here, such as requires_grad and inference mode.
        if list(map(_layout, self._tensors)) != self._layouts:
            return True
        self._guard = _guard(self._tensors)
        return False


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _guard(tensors: Sequence[torch.Tensor]) -> Any:
    """What compares the layouts of all tensors in one call; None where this torch has none, or another one.

    torch.compile's own guards, which are not public. One by one, the layouts take four times as long.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None) if tensors else None
    except (ImportError, TypeError, ValueError, RuntimeError):
        return None
