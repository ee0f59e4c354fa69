"""bitsandbytes: NF4 and FP4 (arXiv 2305.14314), double quantised or not, and int8 (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any

import torch

from fastlock.checkpoints.quantised.site_tensors import Dequantised, Settings, SiteTensors, paired, pairs, scaled
from fastlock.errors import DamagedError
from fastlock.storage.files import json_object

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
MAX_STATE_BYTES = 1024 * 1024
_LARGEST_BLOCK = 2**31
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_INT8_LARGEST = 127


class Bits4:
    """W = quant_map[q] * absmax of its block of consecutive numbers, W's rows one after the other.

    `weight` is hidden * width / 2 bytes, the upper half of a byte first, under any dtype (`quant_storage`); `absmax` is
    float32 a block, or, double quantised, uint8: nested_quant_map[u8] * nested_absmax + nested_offset.
    """

    def __init__(self, tensors: SiteTensors, settings: Settings, state: dict[str, Any]) -> None:
        self._tensors, self._hidden, self._width = tensors, settings.hidden, settings.width
        numbers = settings.hidden * settings.width
        if state.get("shape") != [settings.hidden, settings.width]:
            raise tensors.damaged(f"its quant_state does not say the shape {[settings.hidden, settings.width]}")
        self._block, self._nested, self._offset = _whole(tensors, state, "blocksize"), 0, 0.0
        if settings.width % 2:
            raise tensors.damaged(f"a width of {settings.width} is odd")
        if tensors.get("weight").length != numbers // 2:
            raise tensors.damaged(f"weight has {tensors.get('weight').length} bytes, but should have {numbers // 2}")
        blocks = -(-numbers // self._block)
        tensors.check("weight.quant_map", ("F32",), (16,))
        if "weight.nested_absmax" in tensors:
            self._nested = _whole(tensors, state, "nested_blocksize")
            offset: Any = state.get("nested_offset")
            if type(offset) not in (int, float) or not abs(offset) <= _LARGEST_FLOAT32:
                raise tensors.damaged("its quant_state has no sound nested_offset")
            self._offset = float(offset)
            tensors.check("weight.absmax", ("U8",), (blocks,))
            tensors.check("weight.nested_absmax", ("F32",), (-(-blocks // self._nested),))
            tensors.check("weight.nested_quant_map", ("F32",), (256,))
        else:
            tensors.check("weight.absmax", ("F32",), (blocks,))

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> Bits4 | None:
        """The projection, if its tensors are of this format.

        Raises:
            DamagedError: they are of this format, but do not go together.
        """
        name = next((name for name in _STATES if name in tensors), None)
        if name is None:
            return None
        if tensors.get(name).length > MAX_STATE_BYTES:
            raise tensors.damaged(f"its quant_state has {tensors.get(name).length} bytes")
        try:
            state = json_object(tensors.raw(name))
        except (ValueError, DamagedError) as error:
            raise tensors.damaged(f"its quant_state is not a JSON object ({str(error)[:100]})") from None
        return cls(tensors, settings, state)

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        left = first - first % 2
        right = first + count + (first + count) % 2
        packed = self._tensors.part_of_rows("weight", self._hidden, left // 2, (right - left) // 2)
        table = pairs(self._tensors.whole("weight.quant_map").double().tolist(), upper_first=True)
        whole = all(number % self._block == 0 for number in (self._width, first, count))  # blocks, none in two rows
        places = torch.arange(first, first + count, self._block if whole else 1)
        blocks = (torch.arange(self._hidden)[:, None] * self._width + places) // self._block
        return scaled(
            lambda rows: paired(packed[rows], table)[:, first - left :][:, :count], None, self._absmax(blocks)
        )

    def _absmax(self, blocks: torch.Tensor) -> torch.Tensor:
        """Of these blocks, in their shape, float64."""
        absmax = self._tensors.whole("weight.absmax")[blocks]
        if not self._nested:
            return absmax.double()
        of_blocks = self._tensors.whole("weight.nested_absmax").double()
        codes = self._tensors.whole("weight.nested_quant_map").double()
        return codes[absmax.long()] * of_blocks[blocks // self._nested] + self._offset


class Int8:
    """W = q * SCB / 127, SCB a number for each row. `weight` is [hidden, width] int8, `SCB` [hidden] float32."""

    def __init__(self, tensors: SiteTensors, settings: Settings, scale: str) -> None:
        self._tensors, self._scale = tensors, scale
        tensors.check("weight", ("I8",), (settings.hidden, settings.width))
        tensors.check(scale, ("F32",), (settings.hidden,))

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> Int8 | None:
        """The projection, if its tensors are of this format.

        Raises:
            DamagedError: they are of this format, but do not go together.
        """
        scale = next((name for name in ("SCB", "weight.SCB") if name in tensors), None)
        if scale is None or tensors.dtype("weight") != "I8":
            return None
        if "weight_format" in tensors:
            tensors.check("weight_format", ("U8",), (), (0,), (1,))
            if bool(tensors.whole("weight_format").any()):
                raise tensors.damaged("its weights are in another order than row by row")
        return cls(tensors, settings, scale)

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        q = self._tensors.part("weight", first, count)
        scales = (self._tensors.whole(self._scale).double() / _INT8_LARGEST)[:, None]
        return scaled(lambda rows: q[rows].double(), None, scales)


def _whole(tensors: SiteTensors, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 0 < value <= _LARGEST_BLOCK:
        raise tensors.damaged(f"its quant_state gives {str(value)[:40]!a} as {key}")
    return value
