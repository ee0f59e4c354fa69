"""AWQ, as AutoAWQ's "gemm" version writes it (arXiv 2306.00978)."""

from __future__ import annotations

import torch

from fastlock.checkpoints.quantised.site_tensors import Settings, SiteTensors, in_groups
from fastlock.errors import UnsupportedError

# Column 8 n + _ORDER[i] is in bits 4 i to 4 i + 3 of word n.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
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

    def columns(self, first: int, count: int) -> torch.Tensor:
        """As of `Quantised`."""
        groups = range(first // self._size, -(-(first + count) // self._size))
        q = _in_order(self._tensors.rows("qweight", first, count))  # [hidden, count]
        zeros = _in_order(self._tensors.rows("qzeros", groups.start, len(groups)))  # [hidden, groups]
        scales = self._tensors.rows("scales", groups.start, len(groups)).double().t()
        first -= groups.start * self._size
        whole, of_groups = in_groups(q, zeros, first, self._size)
        whole.sub_(of_groups)
        whole, of_groups = in_groups(q, scales, first, self._size)
        whole.mul_(of_groups)
        return q


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """The 4-bit numbers of words, [rows, n] int32, in the order of their columns: [8 n, rows] float64."""
    transposed = words.t().contiguous()
    numbers = torch.empty(words.shape[1], 8, len(words), dtype=torch.float64)
    for place, column in enumerate(_ORDER):
        numbers[:, column] = (transposed >> (_BITS * place)) & ((1 << _BITS) - 1)
    return numbers.flatten(0, 1)
