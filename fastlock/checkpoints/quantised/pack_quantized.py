"""compressed-tensors' "pack-quantized": whole numbers of 2 to 8 bits, packed along the inputs."""

from __future__ import annotations

import torch

from fastlock.checkpoints.quantised.site_tensors import (
    Dequantised,
    Settings,
    SiteTensors,
    groups_of_inputs,
    in_runs,
    paired,
    pairs,
    scaled,
    unpack,
)

_BITS = (2, 4, 8)
_OF_4_BITS = pairs(range(-8, 8))


class PackQuantized:
    """W[o, i] = (q[o, i] - z[o, g]) * scale[o, g], g the group of input i, both q and z kept 2^(bits - 1) higher.

    `weight_packed` is [hidden, width * bits / 32] int32, the lowest bits first; `weight_scale` [hidden, groups];
    `weight_zero_point` [hidden * bits / 32, groups] where it is not 0; `weight_g_idx` [width] names each input's group,
    where they are not in order.
    """

    def __init__(self, tensors: SiteTensors, settings: Settings) -> None:
        self._tensors, self._hidden = tensors, settings.hidden
        hidden, width = settings.hidden, settings.width
        tensors.check("weight_shape", ("I64", "I32"), (2,))
        if tensors.whole("weight_shape").tolist() != [hidden, width]:
            raise tensors.damaged(f"weight_shape does not say {[hidden, width]}")
        packed = tensors.shape("weight_packed")
        self._bits = packed[1] * 32 // width if len(packed) == 2 else 0
        if self._bits not in _BITS:
            raise tensors.damaged(f"weight_packed is {list(packed)}, which is {self._bits} bits for each of {width}")
        tensors.check("weight_packed", ("I32",), (hidden, width * self._bits // 32))
        scales = tensors.shape("weight_scale")
        groups = scales[1] if len(scales) == 2 else 0
        tensors.check("weight_scale", ("F16", "BF16", "F32"), (hidden, groups))
        if "weight_zero_point" in tensors:
            tensors.check("weight_zero_point", ("I32",), (-(-hidden * self._bits // 32), groups))
        self._group = groups_of_inputs(tensors, "weight_g_idx", groups, width, unused=-1)

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> PackQuantized | None:
        """The projection, if its tensors are of this format.

        Raises:
            DamagedError: they are of this format, but do not go together.
        """
        return cls(tensors, settings) if tensors.dtype("weight_packed") == "I32" else None

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        per_word = 32 // self._bits
        words = range(first // per_word, -(-(first + count) // per_word))
        left = first - words.start * per_word
        packed = self._tensors.part("weight_packed", words.start, len(words))
        groups, zeros = in_runs(self._group[first : first + count]), None
        if "weight_zero_point" in self._tensors:
            kept = self._tensors.whole("weight_zero_point")[:, groups]
            packed_zeros = kept.t().clone(memory_format=torch.contiguous_format)
            zeros = self._less_middle(packed_zeros)[:, : self._hidden].t().contiguous()
        scales = self._tensors.whole("weight_scale")[:, groups].double()
        return scaled(lambda rows: self._less_middle(packed[rows])[:, left : left + count], zeros, scales)

    def _less_middle(self, words: torch.Tensor) -> torch.Tensor:
        """The numbers in words, [rows, words] int32, less what they are kept higher by, as float64."""
        if self._bits == 4:
            return paired(words.view(torch.uint8), _OF_4_BITS)
        return (unpack(words, self._bits) - (1 << (self._bits - 1))).double()
