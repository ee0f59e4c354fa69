"""Stepping many parameters at once: by the fused kernel where it runs, and in plain PyTorch wherever it does not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from fastlock.kernels.proximal_step import launch, reference
from fastlock.kernels.proximal_step.launch import StepScalars, StepTable
from fastlock.kernels.proximal_step.reference import StepTensors
from fastlock.kernels.proximal_step.variants import StepVariant

# How a DTensor lies on its mesh: the mesh, and for each of its dimensions whether the tensor is cut along it.
Sharding: TypeAlias = "tuple[Any, tuple[bool, ...]] | None"
_Key: TypeAlias = "tuple[torch.device, StepVariant, Sharding]"


@dataclass(frozen=True, eq=False)
class StepParameter:
    """One parameter as this process has it.

    Attributes:
        tensors: local ones: of a DTensor, this rank's shard.
        sharding: how the whole lies on its mesh; None for a plain tensor.
    """

    tensors: StepTensors
    sharding: Sharding = None


@dataclass(frozen=True, eq=False)
class Scaled:
    """What a GradScaler hands to an optimizer; each a tensor of one number, or None.

    Attributes:
        found_inf: not 0 if a gradient is infinite or NaN: nothing is to be touched.
        grad_scale: what the loss was multiplied by.
    """

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None

    def on(self, device: torch.device) -> StepScalars:
        """As the step wants it: float32 on the device, the scale inverted as a GradScaler does it."""
        found, scale = self.found_inf, self.grad_scale
        return StepScalars(
            found_inf=None if found is None else found.to(device, torch.float32, non_blocking=True),
            inverse_scale=None if scale is None else scale.double().reciprocal().float().to(device, non_blocking=True),
        )


class StepRunner:
    """Steps the parameters of one optimizer, and keeps the kernels' tables from step to step."""

    def __init__(self) -> None:
        self._tables: dict[_Key, StepTable] = {}
        self._told: set[str] = set()

    def run(self, parameters: Sequence[StepParameter], scaled: Scaled, max_norm: float | None) -> None:
        """Step them all; on a CUDA device nothing is waited for, unless the kernel does not run there.

        Args:
            parameters: each on the device of its own tensors. Those without a gradient are left as they are.
            scaled: of a GradScaler.
            max_norm: gradients, the term included, are scaled down to this total norm; None: they are not.
        """
        by_kernel: dict[_Key, list[StepTensors]] = {}
        plain: list[StepParameter] = []
        for parameter in parameters:
            variant = self._variant(parameter.tensors)
            if variant is not None:
                key = (parameter.tensors.weight.device, variant, parameter.sharding)
                by_kernel.setdefault(key, []).append(parameter.tensors)
            elif parameter.tensors.grad is not None and parameter.tensors.weight.numel():
                plain.append(parameter)
        if plain and scaled.found_inf is not None and scaled.found_inf.item():
            return
        devices = dict.fromkeys([key[0] for key in by_kernel] + [one.tensors.weight.device for one in plain])
        scalars = {device: scaled.on(device) for device in devices}
        tables = [(key, self._table(key), tensors) for key, tensors in by_kernel.items()]
        for key, table, tensors in tables:
            table.update(tensors, scalars[key[0]])
        if max_norm is not None and (tables or plain):
            sums = [_over_shards(table.sum_of_squares(), key[2]) for key, table, _ in tables]
            factor = _clip_factor(sums, plain, scalars, max_norm)
            scalars = {device: replace(one, clip=factor.to(device)) for device, one in scalars.items()}
            for key, table, tensors in tables:
                table.update(tensors, scalars[key[0]])
        for _, table, _ in tables:
            table.step()
        for one in plain:
            of_device = scalars[one.tensors.weight.device]
            reference.proximal_step(one.tensors, of_device.inverse_scale, of_device.clip)

    def _variant(self, tensors: StepTensors) -> StepVariant | None:
        """The kernel for a parameter; None for plain PyTorch."""
        if tensors.weight.device.type != "cuda":
            return None
        variant = launch.variant_of(tensors)
        if variant is None:
            return None
        why = launch.why_not(variant, tensors.weight.device)
        if why is not None and why not in self._told:
            self._told.add(why)
            warnings.warn(f"ProximalAdamW goes without its kernel, more slowly: {why}.", RuntimeWarning, stacklevel=4)
        return variant if why is None else None

    def _table(self, key: _Key) -> StepTable:
        if key not in self._tables:
            self._tables[key] = StepTable(key[1], key[0])
        return self._tables[key]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: of a DTensor its shard, and what is on its way is waited for."""
    tensor = tensor.to_local() if is_sharded(tensor) else tensor
    wait = getattr(tensor, "trigger_wait", None)  # of an AsyncCollectiveTensor
    return tensor if wait is None else wait()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def sharding_of(tensor: torch.Tensor) -> Sharding:
    """How a DTensor lies on its mesh; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    described: Any = tensor
    return described.device_mesh, tuple(placement.is_shard() for placement in described.placements)


def sum_over_shards(sums: Sequence[tuple[torch.Tensor, Sharding]]) -> torch.Tensor:
    """The sum of what each tensor contributes, over all ranks that hold parts of it: one float64, where the first is.

    It is collective, if any of them is a DTensor: every rank must come here.
    """
    by_sharding: dict[Sharding, list[torch.Tensor]] = {}
    for number, sharding in sums:
        by_sharding.setdefault(sharding, []).append(number.double())
    device = sums[0][0].device
    totals = [
        _over_shards(torch.stack([number.to(numbers[0].device) for number in numbers]).sum(), sharding)
        for sharding, numbers in by_sharding.items()
    ]
    return torch.stack([total.to(device) for total in totals]).sum()


def _over_shards(number: torch.Tensor, sharding: Sharding) -> torch.Tensor:
    """The sum of a number over the ranks that hold different parts."""
    if sharding is None or not any(sharding[1]):
        return number
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, cut = sharding
    placements = [Partial() if along else Replicate() for along in cut]
    whole: torch.Tensor = DTensor.from_local(number, mesh, placements, run_check=False).full_tensor()
    return whole


def _clip_factor(
    sums: Sequence[torch.Tensor],
    plain: Sequence[StepParameter],
    scalars: dict[torch.device, StepScalars],
    max_norm: float,
) -> torch.Tensor:
    """What all gradients are multiplied by: one float32."""
    gradients = []
    for one in plain:
        grad = one.tensors.grad
        if grad is not None:
            inverse_scale = scalars[one.tensors.weight.device].inverse_scale
            gradients.append((reference.proximal_gradient(one.tensors, grad, inverse_scale), one.sharding))
    if not sums and all(sharding is None for _, sharding in gradients):
        norm = reference.norm_of([gradient for gradient, _ in gradients])
        return reference.clip_factor(norm, max_norm)
    squares = [(torch.linalg.vector_norm(gradient.float()).double().square(), cut) for gradient, cut in gradients]
    squares += [(number, None) for number in sums]  # already summed over the ranks
    return reference.clip_factor(sum_over_shards(squares).sqrt(), max_norm).float()
