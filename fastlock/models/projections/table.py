"""The kinds of output projections, by the exact type of the module.

A subclass is another type, and not known: quantised and adapted layers inherit from `nn.Linear` and compute something
else. Importing transformers takes seconds, so its types stand here by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastlock.models.projections.foreign import Foreign
from fastlock.models.projections.plain import Bare, Plain, Transposed
from fastlock.models.projections.projection import Projection

Kind = Callable[[Any], Projection]

_KINDS: dict[type | str, Kind] = {
    nn.Linear: Plain,
    Bare: Plain,
    "transformers.models.falcon.modeling_falcon.FalconLinear": Plain,
    "transformers.pytorch_utils.Conv1D": Transposed,
}


def projection_of(module: Any) -> Projection:
    """The projection that a module is; one that never passes its check for a module of no known kind."""
    cls = type(module)
    kind = _KINDS.get(cls) or _KINDS.get(f"{cls.__module__}.{cls.__qualname__}") or Foreign
    return kind(module)
