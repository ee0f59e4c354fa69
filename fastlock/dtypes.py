"""The dtypes that can be folded, and the names that torch and safetensors give them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# By the name that torch gives them, without "torch.": so receipts write it.
BY_TORCH_NAME = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

BY_SAFETENSORS_NAME = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

SAFETENSORS_NAMES = {dtype: name for name, dtype in BY_SAFETENSORS_NAME.items()}

# For messages.
FOLDABLE = "float16, bfloat16, float32 and float64"


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of another dtype is one of this dtype, too."""
    return torch.promote_types(dtype, other) == dtype


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def torch_name(dtype: torch.dtype) -> str:
    """The name that torch gives a dtype, without "torch."."""
    return str(dtype).removeprefix("torch.")
