"""bitsandbytes: `Linear4bit` (NF4 and FP4, arXiv 2305.14314) and `Linear8bitLt` (arXiv 2208.07339).

Both bring their bias to the dtype of their input in the first forward pass (`bias.data = bias.data.to(x.dtype)`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastlock.errors import UnsupportedError
from fastlock.models.projections.quantised import ON_DISK, Dequantised

_INT8_LARGEST = 127
_ROWS = 32  # that lie together in a weight that was repacked


class Linear4bit(Dequantised):
    """W is what the module multiplies with, in the dtype of its quant_state, which is a new bias's too.

    That is what the library's `dequantize_4bit` gives. On a CPU with AVX512-BF16, the first forward pass of a module in
    eval mode rounds its scales to bfloat16 and repacks its weight: W is as after that, from the beginning.
    """

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`."""
        from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

        weight, state = self.module.weight.data, self.module.weight.quant_state
        with torch.no_grad():
            if _is_repacked(state):
                return _repacked(weight, state)
            if _will_be_repacked(self.module):
                return _repacked(*_convert_weight_packed_for_cpu(weight, copy.copy(state)))
            found: torch.Tensor = dequantize_4bit(weight, state)
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


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _will_be_repacked(module: Any) -> bool:
    return (
        getattr(module, "support_avx512bf16_for_cpu", False)
        and module.weight.device.type == "cpu"
        and not module.training
        and module.weight.quant_state.shape[0] % _ROWS == 0  # the library cannot run others
    )


def _repacked(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """W of a weight that the library repacked, float64.

    32 rows lie together, and of each pair of their columns first 16 bytes with both numbers of a row and of the one 16
    further on. The scales are [blocks of a row, rows].
    """
    rows, columns = state.shape
    pairs = weight.view(torch.uint8).reshape(rows // _ROWS, columns // 2, _ROWS)
    numbers = torch.cat([pairs & 15, pairs >> 4], dim=-1).reshape(rows // _ROWS, columns // 2, _ROWS, 2)
    numbers = numbers.transpose(1, 2).reshape(rows, columns)
    scales = state.absmax.T.double().repeat_interleave(state.blocksize, dim=1)
    found: torch.Tensor = state.code.double()[numbers.int()] * scales
    return found
