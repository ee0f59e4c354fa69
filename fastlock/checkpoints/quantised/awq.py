"""AWQ, as AutoAWQ's "gemm" version writes it (arXiv 2306.00978)."""

from __future__ import annotations

import torch

from fastlock.checkpoints.quantised.site_tensors import Dequantised, Settings, SiteTensors, in_runs, scaled
from fastlock.errors import UnsupportedError

# Row 8 n + i of W is in the four bits of word n that begin here.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
_BITS = 4


class Awq:
    """W[o, i] = (q[i, o] - z[g, o]) * scales[g, o], g the group of input i.

    `qweight` is [width, hidden / 8] int32, `qzeros` [groups, hidden / 8] packed likewise, `scales` [groups, hidden].
    """

    def __init__(self, tensors: SiteTensors, settings: Settings) -> None:
        self._tensors = tensors
        hidden, width = settings.hidden, settings.width
        if hidden % 8:
            raise tensors.damaged(f"a hidden size of {hidden} is not a multiple of 8")
        tensors.check("qweight", ("I32",), (width, hidden // 8))
        groups = tensors.shape("scales")[0] if tensors.shape("scales") else 0
        tensors.check("scales", ("F16", "BF16", "F32"), (groups, hidden))
        tensors.check("qzeros", ("I32",), (groups, hidden // 8))
        if groups < 1 or width % groups:
            raise tensors.damaged(f"{groups} groups do not divide {width} inputs")
        self._size = width // groups
        self._word = torch.arange(hidden) // len(_SHIFTS)
        self._shift = torch.tensor(_SHIFTS, dtype=torch.int32).repeat(hidden // len(_SHIFTS))[:, None]

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> Awq | None:
        """The projection, if its tensors are of this format.

        Raises:
            UnsupportedError: they are of another version than "gemm", or not of 4 bits.
            DamagedError: they are of this format, but do not go together.
        """
        if not tensors.has("qweight", "qzeros", "scales") or tensors.shape("qweight")[:1] != (settings.width,):
            return None
        bits, config = settings.config.get("bits", 4), settings.config
        version = next((config[key] for key in ("version", "format") if config.get(key) is not None), "gemm")
        if bits != _BITS or str(version).lower() != "gemm":
            raise UnsupportedError(
                f"{settings.where}: is quantised by AWQ to {str(bits)[:20]!a} bits in version {str(version)[:20]!a}; "
                'fastlock reads 4 bits in version "gemm". Relock the unquantised checkpoint, and quantise it again.'
            )
        return cls(tensors, settings)

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        words = self._tensors.rows("qweight", first, count).t().contiguous()
        groups = in_runs(torch.arange(first, first + count) // self._size)
        start, number = int(groups[0]), int(groups[-1] - groups[0]) + 1
        zeros = self._tensors.rows("qzeros", start, number)[groups - start].t()
        scales = self._tensors.rows("scales", start, number)[groups - start].t()
        return scaled(
            lambda rows: self._numbers(words, rows), self._numbers(zeros, slice(None)), scales.double().contiguous()
        )

    def _numbers(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """The 4-bit numbers of some rows of W in words, [hidden / 8, n] int32: [rows, n] float64."""
        words = words[self._word[rows]]  # a copy
        return words.bitwise_right_shift_(self._shift[rows]).bitwise_and_((1 << _BITS) - 1).double()
