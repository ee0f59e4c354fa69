"""GPTQ, as AutoGPTQ and GPTQModel write it (arXiv 2210.17323): groups of inputs share a scale and a zero point."""

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
from fastlock.errors import UnsupportedError

_BITS = (2, 4, 8)
# What is to be added to the zero points that each version of the format stores.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_OF_4_BITS = pairs(range(16))


class Gptq:
    """W[o, i] = (q[i, o] - z[g, o]) * scales[g, o], g the group of input i.

    `qweight` is [width * bits / 32, hidden] int32, the lowest bits first; `qzeros` [groups, hidden * bits / 32];
    `scales` [groups, hidden]; `g_idx` [width] names each input's group, where the inputs were quantised in another
    order (act-order), which does not change the order of the rows. Version 1 of the format stores z - 1.
    """

    def __init__(self, tensors: SiteTensors, settings: Settings, bits: int) -> None:
        self._tensors, self._bits = tensors, bits
        hidden, width = settings.hidden, settings.width
        if width * bits % 32 or hidden * bits % 32:
            raise tensors.damaged(f"{bits} bits do not pack {hidden} by {width} numbers")
        tensors.check("qweight", ("I32",), (width * bits // 32, hidden))
        groups = tensors.shape("scales")[0] if tensors.shape("scales") else 0
        tensors.check("scales", ("F16", "BF16", "F32"), (groups, hidden))
        tensors.check("qzeros", ("I32",), (groups, hidden * bits // 32))
        self._group = groups_of_inputs(tensors, "g_idx", groups, width)
        self._offset = _ZERO_OFFSETS[_version(settings)]

    @classmethod
    def at(cls, tensors: SiteTensors, settings: Settings) -> Gptq | None:
        """The projection, if its tensors are of this format; by their shapes, where AWQ has tensors of these names.

        Raises:
            UnsupportedError: the number of bits is not one that is packed into whole words, or the version is unknown.
            DamagedError: they are of this format, but do not go together.
        """
        if not tensors.has("qweight", "qzeros", "scales"):
            return None
        shape = tensors.shape("qweight")
        if len(shape) != 2 or (shape[0] == settings.width and shape[1] != settings.hidden):
            return None
        bits = settings.config.get("bits", 4)
        if type(bits) is not int or bits not in _BITS:
            raise UnsupportedError(
                f"{settings.where}: is quantised to {str(bits)[:20]!a} bits by GPTQ; fastlock reads {_BITS}. Relock "
                "the unquantised checkpoint, and quantise it again."
            )
        version = _version(settings)
        if version not in _ZERO_OFFSETS:
            raise UnsupportedError(
                f"{settings.where}: is in the version {version[:20]!a} of GPTQ; fastlock reads "
                f"{' and '.join(_ZERO_OFFSETS)}. Save it in one of them, with GPTQModel."
            )
        return cls(tensors, settings, bits)

    def columns(self, first: int, count: int) -> Dequantised:
        """As of `Quantised`."""
        per_word = 32 // self._bits
        words = range(first // per_word, -(-(first + count) // per_word))
        left = first - words.start * per_word
        stored = self._tensors.rows("qweight", words.start, len(words)).t()
        # One word a row counts as contiguous whatever its stride is, and cannot be seen as bytes then.
        packed = stored.clone(memory_format=torch.contiguous_format)  # [hidden, words]
        groups = in_runs(self._group[first : first + count])
        scales = self._of_groups("scales", groups).double().t().contiguous()
        zeros = unpack(self._of_groups("qzeros", groups), self._bits)
        if self._offset and bool((zeros == (1 << self._bits) - 1).any()):
            raise self._tensors.damaged(
                f"a zero point is {1 << self._bits}, which does not fit into {self._bits} bits, and which engines read "
                "in more than one way"
            )
        zeros = (zeros + self._offset).double().t().contiguous()
        return scaled(lambda rows: self._unpacked(packed[rows])[:, left : left + count], zeros, scales)

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        """The numbers in words, [rows, words] int32, as float64."""
        if self._bits == 4:
            return paired(words.view(torch.uint8), _OF_4_BITS)
        return unpack(words, self._bits).double()

    def _of_groups(self, suffix: str, groups: torch.Tensor) -> torch.Tensor:
        first, last = int(groups.min()), int(groups.max())
        return self._tensors.rows(suffix, first, last - first + 1)[groups - first]


def _version(settings: Settings) -> str:
    """Of the format, as transformers finds it in a config."""
    config = settings.config
    return str(
        next((config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None), "gptq")
    ).lower()
