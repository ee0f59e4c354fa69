"""Whole numbers of 8 bits, or floats of 8, times a scale: int8 and FP8, of one scale for all, a row, or a block."""

from __future__ import annotations

import numpy as np
import torch

from fastlock.checkpoints.quantised.site_tensors import Dequantised, Settings, SiteTensors, in_runs, scaled
from fastlock.errors import UnsupportedError

_BLOCK = 128
_SCALES = ("F16", "BF16", "F32")
# What each byte stands for.
_FLOATS8 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()


class Scaled:
    """W = (q - z) * scale, the scale of its block of rows and columns.

    As compressed-tensors writes "int-quantized" and "float-quantized", ModelOpt FP8, and DeepSeek and Qwen FP8 (whose
    `weight_scale_inv` is the scale all the same). `weight` is [hidden, width] int8 or float8_e4m3fn. The scale is one
    number, [hidden], [hidden, 1], or of blocks of 128 by 128 or whatever the config says, the last of which may be cut
    off.
    """

    def __init__(self, tensors: SiteTensors, settings: Settings, scale: str) -> None:
        self._tensors, self._scale = tensors, scale
        self._hidden = settings.hidden
        tensors.check("weight", ("I8", "F8_E4M3"), (settings.hidden, settings.width))
        shape = tensors.shape(scale)
        shape += (1,) * (2 - len(shape))  # ModelOpt has a number a row in one dimension
        block = _block_of(settings)
        sizes = [
            _block_size(blocks, size, wanted)
            for blocks, size, wanted in zip(
                shape, (settings.hidden, settings.width), block or (None, None), strict=False
            )
        ]
        if len(shape) != 2 or None in sizes or tensors.dtype(scale) not in _SCALES:
            raise tensors.damaged(
                f"{scale} is {tensors.dtype(scale)} {list(tensors.shape(scale))}, which does not fit a weight of "
                f"{[settings.hidden, settings.width]}"
            )
        self._shape, self._rows, self._columns = shape, sizes[0] or 1, sizes[1] or 1
        if "weight_zero_point" in tensors:
            tensors.check("weight_zero_point", ("I8", "I32", "F8_E4M3"), tensors.shape(scale))

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> Scaled | None:
        """The projection, if its tensors are of this format.

        Raises:
            DamagedError: they are of this format, but do not go together.
        """
        if tensors.dtype("weight") not in ("I8", "F8_E4M3"):
            return None
        scale = next((name for name in ("weight_scale", "weight_scale_inv") if name in tensors), None)
        return None if scale is None else cls(tensors, settings, scale)

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        stored = self._tensors.part("weight", first, count)
        groups = in_runs(torch.arange(first, first + count) // self._columns)
        zeros = self._of_rows("weight_zero_point", groups) if "weight_zero_point" in self._tensors else None
        return scaled(lambda rows: _numbers(stored[rows]), zeros, self._of_rows(self._scale, groups))

    def _of_rows(self, suffix: str, groups: torch.Tensor) -> torch.Tensor:
        """The numbers of a small tensor for these groups, at every row: [hidden, groups] float64."""
        numbers = self._tensors.whole(suffix).reshape(self._shape)[:, groups].double()
        return numbers[torch.arange(self._hidden) // self._rows]


def _numbers(stored: torch.Tensor) -> torch.Tensor:
    """Stored numbers as float64; small floats are looked up."""
    if stored.dtype == torch.int8:
        return stored.double()
    return torch.from_numpy(np.take(_FLOATS8, stored.view(torch.uint8).numpy()))


def _block_of(settings: Settings) -> tuple[int, int] | None:
    """The rows and columns of a block, as the config says; None if it does not."""
    block = settings.config.get("weight_block_size")
    groups = settings.config.get("config_groups")
    if block is None and isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        blocks = [one.get("block_structure") for one in weights if isinstance(one, dict)]
        block = next(filter(None, blocks), None)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise UnsupportedError(
            f"{settings.where}: its config gives blocks of {str(block)[:40]!a}; fastlock reads blocks of two whole "
            "numbers, rows and columns."
        )
    return (block[0], block[1])


def _block_size(blocks: int, size: int, given: int | None) -> int | None:
    """How many rows (or columns) a block has, if there are so many blocks; None if that does not fit."""
    if blocks == 1:
        return size
    if blocks == size:
        return 1
    if blocks == -(-size // (given or _BLOCK)):
        return given or _BLOCK
    return size // blocks if given is None and blocks and size % blocks == 0 else None
