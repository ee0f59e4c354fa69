"""bitsandbytes: `Linear4bit` (NF4 and FP4, arXiv 2305.14314) and `Linear8bitLt` (arXiv 2208.07339).

Both bring their bias to the dtype of their input in the first forward pass (`bias.data = bias.data.to(x.dtype)`).
"""

from __future__ import annotations

from typing import Any

import torch

from fastlock.errors import UnsupportedError
from fastlock.models.projections.quantised import ON_DISK, Dequantised

_INT8_LARGEST = 127


class Linear4bit(Dequantised):
    """W is what the library's `dequantize_4bit` gives, in the dtype that was quantised, which is a new bias's too."""

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`."""
        from bitsandbytes.functional import dequantize_4bit

        weight = self.module.weight
        with torch.no_grad():
            found: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """As of `Projection`."""
        return tuple(self.module.weight.quant_state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As of `Projection`."""
        dtype: torch.dtype = self.module.weight.quant_state.dtype
        return dtype if self.bias is None else self.bias.dtype

    @property
    def device(self) -> torch.device:
        """As of `Projection`."""
        device: torch.device = self.module.weight.device
        return device

    def check_format(self, name: str) -> None:
        """As of `Dequantised`."""
        state = getattr(self.module.weight, "quant_state", None)
        if state is None:
            raise UnsupportedError(
                f"{name} is not quantised yet: bitsandbytes does that when the model is brought to a device. Do that "
                "first, then relock."
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedError(
                f"{name} was repacked by bitsandbytes for this CPU in its first forward pass, and its scales were "
                f"rounded. Relock before the first forward pass. {ON_DISK}"
            )


class Linear8bit(Dequantised):
    """W = q * SCB / 127, SCB a number for each row; in float64.

    A new bias is in float32: only its input says what it computes in, and it brings the bias to that.
    """

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`."""
        rows, scales = self._parts()
        found: torch.Tensor = rows.double() * (scales.double() / _INT8_LARGEST)[:, None]
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """As of `Projection`."""
        return tuple(self._parts()[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """As of `Projection`."""
        return torch.float32 if self.bias is None else self.bias.dtype

    @property
    def device(self) -> torch.device:
        """As of `Projection`."""
        device: torch.device = self.module.weight.device
        return device

    def check_format(self, name: str) -> None:
        """As of `Dequantised`."""
        rows, scales = self._parts()
        if self.module.state.has_fp16_weights or rows is None or scales is None or rows.dtype != torch.int8:
            raise UnsupportedError(
                f"{name} is not quantised yet, or anew in each forward pass (has_fp16_weights). Load the model with "
                f"load_in_8bit, then relock. {ON_DISK}"
            )

    def _parts(self) -> tuple[Any, Any]:
        """The rows, int8, and a scale for each: in the weight before the first forward pass, in the state after it."""
        weight, state = self.module.weight, self.module.state
        scales = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        return weight.data, scales
