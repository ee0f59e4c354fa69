"""Floats of 4 bits (E2M1), a scale for every 16 or 32 of them: NVFP4 and MXFP4 (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlock.checkpoints.quantised.site_tensors import (
    Dequantised,
    Settings,
    SiteTensors,
    in_runs,
    paired,
    pairs,
    scaled,
)

# By code: a sign, two bits of exponent, one of mantissa.
_E2M1 = pairs((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
_E8M0_BIAS, _E8M0_NAN = 127, 255


@dataclass(frozen=True)
class _Layout:
    """Under which names a format keeps what, and how many numbers share a scale.

    Attributes:
        packed: the 4-bit floats, [hidden, width / 2] uint8, the lower half of a byte first.
        size: how many inputs share a scale, [hidden, width / size].
        scale_dtypes: of the scales.
        overall: the scale of the whole matrix, or "".
        divides: whether W is divided by it (compressed-tensors) or multiplied (ModelOpt).
    """

    packed: str
    size: int
    scale_dtypes: tuple[str, ...]
    overall: str
    divides: bool


_LAYOUTS = (
    _Layout("weight_packed", 16, ("F8_E4M3",), "weight_global_scale", divides=True),
    _Layout("weight", 16, ("F8_E4M3",), "weight_scale_2", divides=False),
    _Layout("weight_packed", 32, ("U8", "F8_E8M0"), "", divides=False),
)


class Microscaled:
    """W = code's value * its group's scale, over or times the scale of the whole matrix."""

    def __init__(self, tensors: SiteTensors, settings: Settings, layout: _Layout) -> None:
        self._tensors, self._layout = tensors, layout
        hidden, width = settings.hidden, settings.width
        if width % layout.size:
            raise tensors.damaged(f"groups of {layout.size} do not divide {width} inputs")
        tensors.check(layout.packed, ("U8",), (hidden, width // 2))
        tensors.check("weight_scale", layout.scale_dtypes, (hidden, width // layout.size))
        if layout.overall:
            tensors.check(layout.overall, ("F32",), (), (1,))

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> Microscaled | None:
        """The projection, if its tensors are of one of these formats.

        Raises:
            DamagedError: they are of one, but do not go together.
        """
        for layout in _LAYOUTS:
            named = tensors.dtype(layout.packed) == "U8" and tensors.dtype("weight_scale") in layout.scale_dtypes
            if named and (not layout.overall or layout.overall in tensors):
                return cls(tensors, settings, layout)
        return None

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        size = self._layout.size
        bytes_ = range(first // 2, -(-(first + count) // 2))
        packed, left = self._tensors.part(self._layout.packed, bytes_.start, len(bytes_)), first % 2
        groups = in_runs(torch.arange(first, first + count) // size)
        start, number = int(groups[0]), int(groups[-1] - groups[0]) + 1
        scales = self._scales(start, number)[:, groups - start]
        if self._layout.overall:
            overall = self._tensors.whole(self._layout.overall).double().reshape(())
            scales = scales / overall if self._layout.divides else scales * overall
        return scaled(lambda rows: paired(packed[rows], _E2M1)[:, left : left + count], None, scales)

    def _scales(self, first: int, count: int) -> torch.Tensor:
        scales = self._tensors.part("weight_scale", first, count)
        if scales.dtype != torch.uint8:
            return scales.double()
        exponents = torch.where(scales == _E8M0_NAN, float("nan"), scales.double() - _E8M0_BIAS)
        return torch.exp2(exponents)
