"""Projections inside a PEFT layer: the layer's own forward pass says what a displacement becomes in it.

f = layer(d) - layer(0) for the adapters that are active now, in float64. The place for the bias is the base's linear
layer inside: it gets f where the adapters add to its output, W d where they scale all of that, its bias too. A LoRA is
read as W + s B A; anything else is a copy of the layer in float64, run on the locked columns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastlock.errors import UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.projections.plain import Plain
from fastlock.models.projections.projection import Projection
from fastlock.models.projections.stand_in import check_not_replaced

# How far two float64 evaluations of the same number may be apart, relative to the largest of the outputs.
_TOLERANCE = 1e-9
_LORAS = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt")
# Variants of LoRA that compute in evaluation what a plain one does.
_AS_PLAIN = ("MiCALinearVariant", "VeloraLinearVariant", "MontecloraLinearVariant")
# And those that are evaluated. aLoRA and Arrow depend on the input in a way that one evaluation does not show.
_EVALUATED = ("DoraLinearVariant", "BdLoraLinearVariant", "KasaLinearVariant")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def base_of(module: Any) -> nn.Module | None:
    """The linear layer in which a bias acts inside one of PEFT's modules; None for any other module."""
    if not type(module).__module__.startswith("peft."):
        return None
    if not is_tuner_layer(module):
        if not hasattr(module, "modules_to_save"):
            return None
        inside: nn.Module = module.original_module
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        return module.modules_to_save[active[0]] if active and not module.disable_adapters else inside
    base: nn.Module = module.get_base_layer()
    return base


def is_tuner_layer(module: Any) -> bool:
    """Whether one of PEFT's modules computes something with what is inside, and does not only hold copies."""
    return hasattr(module, "get_base_layer") and not hasattr(module, "modules_to_save")


class Adapted:
    """A layer of PEFT's around a projection of another kind, with the adapters that are active in it now."""

    in_place = False

    def __init__(self, layer: Any, base: Projection) -> None:
        """Take note of them.

        Args:
            layer: PEFT's.
            base: what its base layer is.
        """
        self.layer, self.base = layer, base

    @property
    def matrix(self) -> torch.Tensor:
        """As of `Projection`: the base's W, without what adapters make of it."""
        return self.base.matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """As of `Projection`."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """As of `Projection`: that of the base's bias. The columns are float64."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """As of `Projection`."""
        return self.base.device

    @property
    def bias(self) -> torch.Tensor | None:
        """As of `Projection`: the base's."""
        return self.base.bias

    def head_columns(self, heads: Sequence[int], head_dim: int) -> HeadColumns:
        """As of `Projection`: what the base's bias has to hold for a displacement of each column."""
        of_base = self.base.head_columns(heads, head_dim)
        if not self._acting():
            return of_base
        with torch.inference_mode(False), torch.no_grad():
            blocks = [of_base.matrix[:, start : start + head_dim] for start in of_base.starts]
            plain = torch.cat(blocks, dim=1).double()
            columns = [head * head_dim + i for head in heads for i in range(head_dim)]
            found = self._with_loras(plain, columns) if self._is_lora() else self._evaluated(plain, columns)
        return HeadColumns.side_by_side(found, head_dim)

    def check(self, name: str) -> None:
        """As of `Projection`: and that the layer is affine, so that a bias can do what a displacement does."""
        self.base.check(name)
        check_not_replaced(self.layer, name)
        if not self._acting():
            return
        self._check_variants(name)
        if self._is_lora():
            return
        if not isinstance(self.base, Plain):
            raise UnsupportedError(
                f"{name}: {_shown(self.layer)} is evaluated over plain linear layers alone, and its base is quantised. "
                "Load the base unquantised, or relock the adapter on disk (fastlock relock ADAPTER --base BASE)."
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                affine = self._is_affine()
        except Exception as error:  # PEFT raises whatever its layers raise
            raise UnsupportedError(
                f"{name}: {_shown(self.layer)} cannot be evaluated by itself ({type(error).__name__}: "
                f"{str(error)[:200]}). Merge its adapters (merge_and_unload), then relock."
            ) from None
        if not affine:
            raise UnsupportedError(
                f"{name}: {_shown(self.layer)} is not affine: what a displacement does depends on the layer's input, "
                "and no bias does the same. Merge its adapters (merge_and_unload) if PEFT can, then relock."
            )

    def _acting(self) -> bool:
        """Whether adapters change what the layer computes, beside what is merged into its base."""
        return not self.layer.disable_adapters and not self.layer.merged

    def _check_variants(self, name: str) -> None:
        if "forward" in self.layer.__dict__:
            raise UnsupportedError(
                f"{name}: the forward pass of {_shown(self.layer)} was replaced (X-LoRA does that): what adapters do "
                "depends on the input. Merge them (merge_and_unload) if PEFT can, then relock."
            )
        if getattr(self.layer, "_lora_kasa_truncation_deferred", None):
            raise UnsupportedError(
                f"{name}: PEFT will change its weight in the first forward pass (KaSA, low_cpu_mem_usage). Run one, "
                "then relock."
            )
        for variant in map(type, self._variants()):
            if variant.__name__ not in (*_AS_PLAIN, *_EVALUATED):
                raise UnsupportedError(
                    f"{name}: has a LoRA of the kind {variant.__name__}, which acts differently at different positions "
                    "or inputs, and no bias does. Use a plain LoRA."
                )

    def _variants(self) -> list[Any]:
        variants = getattr(self.layer, "lora_variant", {})
        return [variants[name] for name in self.layer.active_adapters if name in variants]

    def _is_lora(self) -> bool:
        """Whether all that acts is LoRAs that add s B A."""
        cls = type(self.layer)
        plain = all(type(variant).__name__ in _AS_PLAIN for variant in self._variants())
        return f"{cls.__module__}.{cls.__qualname__}" in _LORAS and plain

    def _with_loras(self, plain: torch.Tensor, columns: list[int]) -> torch.Tensor:
        """The columns of W + s B A, [hidden, len(columns)] float64."""
        layer, found = self.layer, plain.clone()
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight[:, columns].double(), layer.lora_B[name].weight.double()
                found += (layer.scaling[name] * (b @ a)).to(found.device)
        return found

    def _evaluated(self, plain: torch.Tensor, columns: list[int]) -> torch.Tensor:
        """Columns from a copy of the layer: of W where adapters scale a bias of the base, too."""
        with self._copied() as copied:
            base = copied.get_base_layer()
            units = plain.new_zeros(len(columns) + 1, self.shape[1])
            units[range(len(columns)), columns] = 1
            outputs = copied(units[None])[0]
            found: torch.Tensor = (outputs[:-1] - outputs[-1]).t()
            of_base, of_layer = plain.sum(dim=1), found.sum(dim=1)
            own = base.bias
            base.bias = nn.Parameter(of_base if own is None else own + of_base, requires_grad=False)
            through = copied(units[-1:][None])[0, 0] - outputs[-1]
            scale = float(max(outputs.abs().max(), of_base.abs().max(), of_layer.abs().max()))
        if alike(through, of_base, scale):
            return found.contiguous()
        if alike(through, of_layer, scale):
            return plain
        raise UnsupportedError(
            f"{_shown(self.layer)} treats a bias of its base in a way that fastlock does not know. Merge its adapters "
            "(merge_and_unload), then relock."
        )

    def _is_affine(self) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        x, d = torch.randn(2, self.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(self.device)
        with self._copied() as copied:
            zero, of_d, of_x, of_both = copied(torch.stack([0 * d, d, x, x + d])[None])[0]
        return alike(of_both - of_x, of_d - zero, float(max(of_both.abs().max(), of_d.abs().max())))

    @contextlib.contextmanager
    def _copied(self) -> Iterator[Any]:
        """A copy of the layer in float64, without its hooks, as it computes in evaluation."""
        copied = copy.deepcopy(self.layer).eval()
        for module in copied.modules():
            for hooks in _HOOKS:
                getattr(module, hooks).clear()
        yield copied.requires_grad_(False).double()


def alike(a: torch.Tensor, b: torch.Tensor, scale: float) -> bool:
    """Whether two float64 evaluations give the same numbers, up to rounding; the largest of the outputs is `scale`."""
    return bool(((a - b).abs() <= _TOLERANCE * scale).all())


def _shown(layer: object) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
