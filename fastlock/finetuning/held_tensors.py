"""What an optimizer stepped last: whether it is all still there, found out at little cost."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastlock.finetuning.sharded_tensors import is_sharded, local
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors


class HeldTensors:
    """The parameters of one step by kernels, for as long as nothing but their gradients and numbers changes.

    A model has hundreds of them, and a step's kernels take less than a millisecond: what the host does for each
    parameter is what counts. The counts of all steps become views of one tensor here, which is counted up at once.

    Attributes:
        groups: of each parameter that has a state, which parameter group it is in.
    """

    def __init__(
        self,
        every: Sequence[torch.Tensor],
        states: Mapping[torch.Tensor, dict[str, Any]],
        parameters: Sequence[torch.Tensor],
        groups: Sequence[int],
        tensors: Sequence[StepTensors],
        settings: Sequence[StepSettings],
    ) -> None:
        """Hold them.

        Args:
            every: all parameters of the optimizer.
            states: those of the optimizer.
            parameters: the ones that have a state, in that order.
            groups: see above.
            tensors: of each, as it was stepped. Its gradient is not kept.
            settings: of each group.
        """
        self._kinds = _kinds(settings)
        self.groups = list(groups)
        self._every, self._parameters = list(every), list(parameters)
        of_each = [states[parameter] for parameter in parameters]
        self._steps = torch.tensor([state["step"].item() for state in of_each], dtype=torch.float32)
        for state, step in zip(of_each, self._steps, strict=True):
            state["step"] = step
        self._values = _values(states)
        stepped = set(map(id, parameters))
        self._without_state = [parameter for parameter in every if id(parameter) not in stepped]
        self._sharded = any(map(is_sharded, parameters))
        fixed = [(one.weight, one.exp_avg, one.exp_avg_sq, one.anchor) for one in tensors]
        self._fixed = [x for of_one in fixed for x in of_one if x is not None]
        self._addresses = [x.data_ptr() for x in self._fixed]
        self._weights = [one.weight for one in tensors]
        self._numels = [weight.numel() for weight in self._weights]

    def gradients(
        self,
        every: Sequence[torch.Tensor],
        states: Mapping[torch.Tensor, dict[str, Any]],
        settings: Sequence[StepSettings],
    ) -> list[torch.Tensor | None] | None:
        """The local gradient of each, if all else is as it was; None if something is not. See `__init__`."""
        unchanged = _kinds(settings) == self._kinds and _same(every, self._every)
        if not unchanged or not _same(_values(states), self._values):
            return None
        grads: list[torch.Tensor | None] = [parameter.grad for parameter in self._parameters]
        if any(parameter.grad is not None for parameter in self._without_state):
            return None
        if self._sharded:
            if not _same([local(parameter) for parameter in self._parameters], self._weights):
                return None
            grads = [None if grad is None else local(grad) for grad in grads]
        if [x.data_ptr() for x in self._fixed] != self._addresses:
            return None
        return grads if self._fit(grads) else None

    def _fit(self, grads: Sequence[torch.Tensor | None]) -> bool:
        """Whether gradients are as the kernel wants them, without a closer look."""
        plain = torch.strided
        for grad, weight, numel in zip(grads, self._weights, self._numels, strict=True):
            if grad is not None and not (
                grad.layout is plain
                and grad.dtype is weight.dtype
                and grad.numel() == numel
                and grad.is_contiguous()
                and weight.is_contiguous()
                and grad.is_cuda == weight.is_cuda
            ):
                return False
        return True

    def steps(self) -> list[float]:
        """How many steps each has taken."""
        counts: list[float] = self._steps.tolist()
        return counts

    def count(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Count a step of those that have a gradient; what was added to the counts, so that it can be taken back."""
        added = torch.ones_like(self._steps)
        if any(grad is None for grad in grads):
            added = torch.tensor([float(grad is not None) for grad in grads])
        self._steps.add_(added)
        return added

    def take_back(self, added: torch.Tensor) -> None:
        """Undo a `count`."""
        self._steps.sub_(added)


def _kinds(settings: Sequence[StepSettings]) -> list[tuple[bool, bool]]:
    """What of the settings decides which kernel is launched."""
    return [(of_group.acts, of_group.seed is None) for of_group in settings]


def _values(states: Mapping[torch.Tensor, dict[str, Any]]) -> list[Any]:
    """All that is in the states, in one row."""
    return [value for state in states.values() for value in state.values()]


def _same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether they are the same objects, in the same order."""
    return len(ones) == len(others) and all(map(operator.is_, ones, others))
