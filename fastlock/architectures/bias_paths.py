"""Config keys by which some release of transformers goes another way through a family's code, past the bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlock.errors import UnsupportedError


def keys_that_use_the_bias(model_type: str, keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a decoder's config has to say instead for every release of transformers to use an output projection bias.

    Up to 4.46, a Llama with pretraining_tp above 1 multiplies by slices of each weight and leaves every bias out. One
    product with the whole weight is the same but for the order of the sums, and what every later release computes.
    BLOOM's way past its bias leaves out the model's own, too, and is refused with the family.

    Args:
        model_type: its family.
        keys: the decoder's config, as it is written.
        name: whose it is, for messages.

    Raises:
        UnsupportedError: the model has biases of its own there, which one release leaves out and others do not.
    """
    slices = keys.get("pretraining_tp")
    if model_type != "llama" or type(slices) is not int or slices <= 1:
        return {}
    if keys.get("attention_bias") or keys.get("mlp_bias"):
        raise UnsupportedError(
            f"{name}: with pretraining_tp {slices}, transformers up to 4.46 leaves out the lock, and the model's own "
            "biases. Set pretraining_tp to 1 in config.json, which is what later releases compute, then relock."
        )
    return {"pretraining_tp": 1}
