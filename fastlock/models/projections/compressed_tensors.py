"""compressed-tensors: an `nn.Linear` by its type, with a scheme, and another `forward`.

Until the first forward pass its weight is compressed, or under another name; afterwards it is dequantised. Which of the
two it is, `quantization_status` says.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlock.dtypes import BY_TORCH_NAME
from fastlock.errors import UnsupportedError
from fastlock.models.projections.quantised import ON_DISK, Dequantised

# By the names of `compressed_tensors.quantization.QuantizationStatus`.
_COMPRESSED, _DECOMPRESSED = "compressed", "decompressed"


class CompressedTensors(Dequantised):
    """W is what the library's own `decompress` makes of the tensors, in the dtype of the scales."""

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`."""
        module = self.module
        if self._status() == _DECOMPRESSED:
            weight: torch.Tensor = module.weight
            return weight.detach()
        from compressed_tensors.compressors import BaseCompressor

        scheme = module.quantization_scheme
        own = {**module._parameters, **module._buffers}
        tensors = {name: tensor.detach() for name, tensor in own.items() if tensor is not None and name != "bias"}
        compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        with torch.no_grad():
            weight = compressor.decompress(tensors, scheme)["weight"]
        return weight.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """As of `Projection`."""
        return (self.module.out_features, self.module.in_features)

    @property
    def dtype(self) -> torch.dtype:
        """As of `Projection`: that of the scales, in which the library dequantises where they are not small floats."""
        scale = getattr(self.module, "weight_scale", None)
        known = self._status() == _COMPRESSED and scale is not None and scale.dtype in BY_TORCH_NAME.values()
        return scale.dtype if known and scale is not None else self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """As of `Projection`."""
        device: torch.device = next(self.module.parameters(recurse=False)).device
        return device

    def check_format(self, name: str) -> None:
        """As of `Dequantised`."""
        store = self.module._parameters
        if getattr(store, "onload_device", None) != getattr(store, "offload_device", None):
            raise UnsupportedError(
                f"{name} is offloaded by compressed-tensors from {store.onload_device} to {store.offload_device}, and "
                f"a bias put there would be lost. Load the model without offloading. {ON_DISK}"
            )
        status, scheme = self._status(), getattr(self.module, "quantization_scheme", None)
        if status not in (_COMPRESSED, _DECOMPRESSED):
            raise UnsupportedError(
                f"{name} is still being calibrated by compressed-tensors ({status}), and its weight is rounded anew in "
                "each forward pass. Finish and save it, then relock the checkpoint on disk."
            )
        if scheme is None or (scheme.format is None and status == _COMPRESSED):
            raise UnsupportedError(f"{name} is compressed, and does not say in which format. {ON_DISK}")
        if getattr(scheme, "output_activations", None) is not None:
            raise UnsupportedError(
                f"{name} quantises what it gives out, its bias included: the lock would be rounded with it. {ON_DISK}"
            )

    def _status(self) -> str:
        status: Any = getattr(self.module, "quantization_status", None)
        return str(getattr(status, "value", status))
