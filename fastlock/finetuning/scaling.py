"""Layers with their weights scaled for a while: attention and MLP, never norms or biases; afterwards bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastlock.errors import UnsupportedError


def scaled_weights(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of a layer that are scaled: those of two dimensions and more. Norms and biases have one."""
    return [(name, parameter) for name, parameter in layer.named_parameters() if parameter.dim() > 1]


def check_scalable(layer: nn.Module, name: str) -> None:
    """Refuse a layer whose weights cannot be scaled.

    Raises:
        UnsupportedError: there are none, they are quantised, elsewhere (offloaded), or parts of sharded ones.
    """
    weights = scaled_weights(layer)
    if not weights:
        raise UnsupportedError(f"{name}: it has no weights that can be scaled. Load the model in bfloat16 or float32.")
    for weight_name, weight in weights:
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UnsupportedError(
                f"{name}.{weight_name} is {weight.dtype}: it is quantised, and cannot be scaled. Load the model in "
                "bfloat16 or float32."
            )
        if weight.device.type == "meta" or hasattr(weight, "device_mesh"):
            raise UnsupportedError(
                f"{name}.{weight_name} is not on this device as a whole (offloaded or sharded), and cannot be scaled. "
                "Load the model on devices with room for all of it."
            )


@contextlib.contextmanager
def kept(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever happens in the block, also to `scaled` itself: afterwards the weights have their own memory again."""
    originals = [(weight, weight.data) for layer in layers for _, weight in scaled_weights(layer)]
    try:
        yield
    finally:
        for weight, original in originals:
            weight.data = original


@contextlib.contextmanager
def scaled(layer: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the weights of a layer, [rows, columns] and more dimensions, by a number; then put the old ones back.

    The old bytes are never written to: the parameters hold scaled copies meanwhile, and then their own memory again,
    however the block ends. (Dividing again would change 6 to 14 % of bfloat16 weights.)

    Args:
        layer: a decoder layer.
        scale: the paper's α.
    """
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for _, weight in scaled_weights(layer):
            originals.append((weight, weight.data))
            weight.data = weight.data * scale
        yield
    finally:
        for weight, original in originals:
            weight.data = original
