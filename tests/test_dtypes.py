"""The dtypes that can be folded have the names that torch and safetensors give them."""

import json

import safetensors.torch
import torch

from fastlock.dtypes import BY_SAFETENSORS_NAME, BY_TORCH_NAME, FOLDABLE, torch_name


def name_in_a_file(dtype: torch.dtype) -> str:
    data = safetensors.torch.save({"x": torch.zeros(1, dtype=dtype)})
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]["dtype"]


def test_names() -> None:
    foldable = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    foldable = [dtype for dtype in dict.fromkeys(foldable) if dtype.itemsize > 1]
    assert set(BY_TORCH_NAME.values()) == set(foldable)
    assert {torch_name(dtype): dtype for dtype in foldable} == BY_TORCH_NAME
    assert {name_in_a_file(dtype): dtype for dtype in foldable} == BY_SAFETENSORS_NAME
    assert FOLDABLE.replace(" and", ",").split(", ") == list(BY_TORCH_NAME)
