"""The kinds of output projections, by the exact type of the module.

A subclass is another type, and not known: quantised and adapted layers inherit from `nn.Linear` and compute something
else. Importing transformers takes seconds, so its types stand here by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastlock.models.projections.adapted import Adapted, is_tuner_layer
from fastlock.models.projections.bitsandbytes import Linear4bit, Linear8bit
from fastlock.models.projections.compressed_tensors import CompressedTensors
from fastlock.models.projections.foreign import Foreign
from fastlock.models.projections.plain import Bare, Plain, Transposed
from fastlock.models.projections.projection import Projection

Kind = Callable[[Any], Projection]

_KINDS: dict[type | str, Kind] = {
    nn.Linear: Plain,
    Bare: Plain,
    "transformers.models.falcon.modeling_falcon.FalconLinear": Plain,
    "transformers.pytorch_utils.Conv1D": Transposed,
    "bitsandbytes.nn.modules.Linear4bit": Linear4bit,
    "bitsandbytes.nn.modules.LinearNF4": Linear4bit,
    "bitsandbytes.nn.modules.LinearFP4": Linear4bit,
    "bitsandbytes.nn.modules.Linear8bitLt": Linear8bit,
}

# What keeps another kind's type, and is known by an attribute.
_MARKS: dict[str, Kind] = {"quantization_status": CompressedTensors}


def projection_of(module: Any) -> Projection:
    """The projection that a module is; one that never passes its check for a module of no known kind."""
    cls = type(module)
    marked = next((kind for mark, kind in _MARKS.items() if getattr(module, mark, None) is not None), None)
    kind = marked or _KINDS.get(cls) or _KINDS.get(f"{cls.__module__}.{cls.__qualname__}") or Foreign
    return kind(module)


def adapted_projection(layer: Any, base: Any) -> Projection:
    """The projection that one of PEFT's layers makes of the module inside it."""
    inside = projection_of(base)
    return Adapted(layer, inside) if is_tuner_layer(layer) else inside
