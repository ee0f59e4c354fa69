"""Stepping many parameters at once: by the fused kernel where it runs, and in plain PyTorch wherever it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fastlock.errors import FastlockWarning, UnsupportedError
from fastlock.finetuning.held_tensors import HeldTensors
from fastlock.finetuning.sharded_tensors import Sharding, over_shards, sum_over_shards
from fastlock.kernels.proximal_step import launch, reference
from fastlock.kernels.proximal_step.launch import StepScalars, StepTable
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors
from fastlock.kernels.proximal_step.variants import StepVariant

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
class StepOptions:
    """What is the same for all parameters of a step.

    Attributes:
        found_inf: a GradScaler's: not 0 if a gradient is infinite or NaN, and nothing is to be touched; or None.
        grad_scale: a GradScaler's: what the loss was multiplied by; or None.
        max_norm: gradients, the term included, are scaled down to this total norm; None: they are not.
    """

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None
    max_norm: float | None = None

    def on(self, device: torch.device) -> StepScalars:
        """As the step wants it: float32 on the device, the scale inverted as a GradScaler does it.

        The factor of a clipped norm has a place there, and no value yet.
        """
        found, scale = self.found_inf, self.grad_scale
        return StepScalars(
            found_inf=None if found is None else found.to(device, torch.float32, non_blocking=True),
            inverse_scale=None if scale is None else scale.double().reciprocal().float().to(device, non_blocking=True),
            clip=None if self.max_norm is None else torch.ones((), dtype=torch.float32, device=device),
        )


class StepRunner:
    """Steps the parameters of one optimizer, and keeps the kernels' tables from step to step."""

    def __init__(self) -> None:
        self._tables: dict[_Key, StepTable] = {}
        self._runs: dict[tuple[torch.device, StepVariant, bool], bool] = {}
        self._held: HeldTensors | None = None
        self._members: dict[_Key, list[int]] = {}

    def run(self, parameters: Sequence[StepParameter], options: StepOptions) -> bool:
        """Step them all; on a CUDA device nothing is waited for, unless the kernel does not run there.

        Args:
            parameters: each on the device of its own tensors. Those without a gradient are left as they are.
            options: see there.

        Returns:
            whether all of them were stepped by kernels. They can then be held, see `hold`.
        """
        by_kernel: dict[_Key, list[int]] = {}
        plain: list[StepParameter] = []
        for i, parameter in enumerate(parameters):
            variant = self._variant(parameter.tensors, options.max_norm is not None)
            if variant is not None:
                key = (parameter.tensors.weight.device, variant, parameter.sharding)
                by_kernel.setdefault(key, []).append(i)
            else:
                plain.append(parameter)
        if by_kernel:
            _refuse_capture()
        moved = [one for one in plain if one.tensors.grad is not None]
        if moved and options.found_inf is not None and options.found_inf.item():
            return False
        scalars = {device: options.on(device) for device in _devices(by_kernel, moved)}
        for key, members in by_kernel.items():
            table = self._tables.setdefault(key, StepTable(key[1], key[0]))
            table.update([parameters[i].tensors for i in members], scalars[key[0]])
        self._launch(list(by_kernel), moved, scalars, options.max_norm)
        self._held, self._members = None, by_kernel
        return not plain

    def hold(self, held: HeldTensors) -> None:
        """Keep what the last `run` stepped, for `again`: its parameters, in that order."""
        self._held = held

    def again(
        self,
        every: Sequence[torch.Tensor],
        states: dict[torch.Tensor, dict[str, object]],
        settings: Sequence[StepSettings],
        options: StepOptions,
    ) -> Callable[[], None] | None:
        """Step what is held once more, if nothing changed but gradients and numbers; much sooner than `run` does.

        Args:
            every: all parameters of the optimizer.
            states: those of the optimizer.
            settings: of each group.
            options: as in `run`.

        Returns:
            None if something else changed, and nothing was done. Else the step is queued and counted; what is returned
            takes back the count.
        """
        held, members = self._held, self._members
        grads = None if held is None else held.gradients(every, states, settings)
        if held is None or grads is None or all(grad is None for grad in grads):
            return None
        if options.max_norm is not None and any(not self._runs.get((*key[:2], True)) for key in members):
            return None
        _refuse_capture()
        scalars = {device: options.on(device) for device in _devices(members, [])}
        places = list(zip(held.groups, held.steps(), strict=True))
        for key, of_table in members.items():
            rows: dict[tuple[int, float], int] = {}
            row_of = [rows.setdefault(places[i], len(rows)) for i in of_table]
            settings_of = [(settings[group], step + 1) for group, step in rows]
            self._tables[key].advance(row_of, settings_of, [grads[i] for i in of_table], scalars[key[0]])
        self._launch(list(members), [], scalars, options.max_norm)
        added = held.count(grads)
        return lambda: held.take_back(added)

    def _launch(
        self,
        keys: Sequence[_Key],
        plain: Sequence[StepParameter],
        scalars: dict[torch.device, StepScalars],
        max_norm: float | None,
    ) -> None:
        factor = None
        if max_norm is not None and (keys or plain):
            sums = [over_shards(self._tables[key].sum_of_squares(), key[2]) for key in keys]
            factor = _clip_factor(sums, plain, scalars, max_norm)
            for one in scalars.values():
                if one.clip is not None:
                    one.clip.copy_(factor)
        for key in keys:
            self._tables[key].step()
        for parameter in plain:
            inverse_scale = scalars[parameter.tensors.weight.device].inverse_scale
            reference.proximal_step(parameter.tensors, inverse_scale, factor)

    def _variant(self, tensors: StepTensors, clipped: bool) -> StepVariant | None:
        """The kernel for a parameter; None for plain PyTorch."""
        device = tensors.weight.device
        if not launch.has_kernels(device):
            return None
        variant = launch.variant_of(tensors)
        if variant is None:
            return None
        key = (device, variant, clipped)
        if key not in self._runs:
            why = launch.why_not(variant, device)
            if why is None and clipped:
                why = launch.why_not(variant.of_norm, device)
            if why is not None:
                warnings.warn(f"ProximalAdamW goes without its kernel: {why}.", FastlockWarning, stacklevel=5)
            self._runs[key] = why is None
        return variant if self._runs[key] else None


def _devices(keys: Sequence[_Key] | dict[_Key, list[int]], plain: Sequence[StepParameter]) -> list[torch.device]:
    return list(dict.fromkeys([key[0] for key in keys] + [one.tensors.weight.device for one in plain]))


def _refuse_capture() -> None:
    """A captured graph would step by the same numbers, and the same gradients' addresses, again and again."""
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a CUDA graph is being captured: the step's numbers change with every step, and it would repeat the same "
            "ones. Capture forward and backward, and step outside."
        )


def _clip_factor(
    sums: Sequence[torch.Tensor],
    plain: Sequence[StepParameter],
    scalars: dict[torch.device, StepScalars],
    max_norm: float,
) -> torch.Tensor:
    """What all gradients are multiplied by: one number."""
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
    return reference.clip_factor(sum_over_shards(squares).sqrt(), max_norm)
