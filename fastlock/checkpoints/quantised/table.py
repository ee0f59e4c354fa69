"""The quantised formats, a line each; chosen by the tensors at the site, not by what the config says alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastlock.checkpoints.quantised.awq import Awq
from fastlock.checkpoints.quantised.bitsandbytes import Bits4, Int8
from fastlock.checkpoints.quantised.gptq import Gptq
from fastlock.checkpoints.quantised.microscaled import Microscaled
from fastlock.checkpoints.quantised.pack_quantized import PackQuantized
from fastlock.checkpoints.quantised.scaled import Scaled
from fastlock.checkpoints.quantised.site_tensors import Quantised, Settings, SiteTensors
from fastlock.checkpoints.tensor_index import StoredTensor

Kind = Callable[[SiteTensors, Settings], Quantised | None]

# The more telling tensors come first: bitsandbytes' weight may have any dtype, and AWQ shares its names with GPTQ.
KINDS: tuple[tuple[str, Kind], ...] = (
    ("bitsandbytes 4-bit", Bits4.at),
    ("bitsandbytes int8", Int8.at),
    ("AWQ", Awq.at),
    ("GPTQ", Gptq.at),
    ("compressed-tensors pack-quantized", PackQuantized.at),
    ("NVFP4 or MXFP4", Microscaled.at),
    ("int8 or FP8", Scaled.at),
)

# Under one of these names every projection has its weight.
WEIGHTS = ("weight", "qweight", "weight_packed")
# What a projection has beside its weight if that is quantised, where the weight's name does not tell.
_BESIDE = ("weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "weight.SCB", "scales")


def is_projection(tensors: Mapping[str, StoredTensor], name: str) -> bool:
    """Whether there is a projection of this name, quantised or not: it is known by any of its tensors."""
    return any(f"{name}.{suffix}" in tensors for suffix in (*WEIGHTS, *_BESIDE))


def is_quantised(tensors: Mapping[str, StoredTensor], name: str) -> bool:
    """Whether the projection of this name is quantised, in a format of the table or not."""
    return f"{name}.weight" not in tensors or any(f"{name}.{suffix}" in tensors for suffix in _BESIDE)


def quantised_at(tensors: SiteTensors, settings: Settings) -> Quantised | None:
    """The quantised projection that these tensors are, or None if they are of no format in the table.

    Raises:
        UnsupportedError: they are of a variant that fastlock does not read.
        DamagedError: they do not go together.
    """
    return next((kind for _, at in KINDS if (kind := at(tensors, settings)) is not None), None)


def format_at(tensors: SiteTensors, settings: Settings) -> str | None:
    """The name of the format of a quantised projection; raises as `quantised_at`."""
    return next((name for name, at in KINDS if at(tensors, settings) is not None), None)
