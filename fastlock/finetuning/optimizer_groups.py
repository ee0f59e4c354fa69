"""The parameter groups of ProximalAdamW, and what they are refused for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.proximal_step.reference import StepSettings

_STATE_DTYPES = (None, torch.float32, torch.bfloat16)
_ANCHOR_DTYPES = (None, torch.float32)

# What another AdamW's group lacks. Its state can go on without an anchor.
WITHOUT_PULL: dict[str, Any] = {
    "pull": 0.0,
    "anchor_decay": 0.0,
    "max_grad_norm": None,
    "state_dtype": None,
    "anchor_dtype": None,
    "stochastic_rounding": False,
    "seed": 0,
    "anchored": False,
}


def settings_of(group: dict[str, Any], where: str) -> StepSettings:
    """A group's numbers.

    Args:
        group: one of `torch.optim.Optimizer.param_groups`, or its defaults.
        where: whose they are, for the message.

    Raises:
        FastlockError: one of them is out of its range.
    """
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise FastlockError(f"{where}: lr is a tensor of {lr.numel()} numbers; give one.")
        lr = lr.item()
    betas = group["betas"]
    if len(betas) != 2:
        raise FastlockError(f"{where}: betas are {betas!r}; give two numbers.")
    numbers = {"lr": lr, "eps": group["eps"], "weight_decay": group["weight_decay"], "pull": group["pull"]}
    numbers |= {"anchor_decay": group["anchor_decay"]}
    for name, number in numbers.items():
        if not _is_number(number) or not 0 <= number < math.inf:
            raise FastlockError(f"{where}: {name} is {number!r}; it must be a finite number of at least 0.")
    for i, beta in enumerate(betas):
        if not _is_number(beta) or not 0 <= beta < 1:
            raise FastlockError(f"{where}: betas[{i}] is {beta!r}; it must be at least 0 and below 1.")
    norm = group["max_grad_norm"]
    if norm is not None and (not _is_number(norm) or not norm > 0):
        raise FastlockError(f"{where}: max_grad_norm is {norm!r}; it must be above 0, or None.")
    for name, dtypes in (("state_dtype", _STATE_DTYPES), ("anchor_dtype", _ANCHOR_DTYPES)):
        if group[name] not in dtypes:
            raise FastlockError(f"{where}: {name} is {group[name]!r}; it must be one of {', '.join(map(str, dtypes))}.")
    seed = group["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise FastlockError(f"{where}: seed is {seed!r}; it must be an integer.")
    rounding = seed if group["stochastic_rounding"] else None
    beta1, beta2 = betas
    checked = {name: float(number) for name, number in numbers.items()}
    return StepSettings(beta1=float(beta1), beta2=float(beta2), seed=rounding, **checked)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def not_empty(params: Any) -> Any:
    """The parameters that an optimizer was given.

    Raises:
        FastlockError: there are none.
    """
    if isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
        params = list(params)
        if not params:
            raise FastlockError("there is no parameter to optimize. Give model.parameters(), and check requires_grad.")
    return params


def check_group(groups: list[dict[str, Any]], last: int) -> None:
    """A new group fits those that are there already.

    Raises:
        FastlockError: a number is out of its range, or the groups do not go together.
        UnsupportedError: a parameter is complex.
    """
    group = groups[last]
    settings_of(group, f"group {last}")
    if group["max_grad_norm"] != groups[0]["max_grad_norm"]:
        raise FastlockError(
            f"group {last}: max_grad_norm is {group['max_grad_norm']}, and {groups[0]['max_grad_norm']} in group 0; it "
            "is of all groups together. Give it to ProximalAdamW itself."
        )
    for i, parameter in enumerate(group["params"]):
        if parameter.is_complex():
            raise UnsupportedError(f"{_name(group, i)} is complex. Give its real view: torch.view_as_real(parameter).")


def check_rounding(groups: list[dict[str, Any]]) -> None:
    """Stochastic rounding has something to round.

    Raises:
        FastlockError: it was asked for, and no parameter is bfloat16.
    """
    asked = any(group["stochastic_rounding"] for group in groups)
    if asked and not any(x.dtype == torch.bfloat16 for group in groups for x in group["params"]):
        raise FastlockError("stochastic_rounding is for bfloat16 parameters, and there is none. Leave it out.")


def check_gradient(parameter: torch.Tensor, lacks_anchor: bool, group: dict[str, Any], place: int) -> None:
    """A parameter can be stepped.

    Raises:
        UnsupportedError: its gradient is sparse.
        FastlockError: it lacks an anchor that others have.
    """
    grad = parameter.grad
    if grad is not None and grad.layout != torch.strided:
        raise UnsupportedError(
            f"{_name(group, place)} has a sparse gradient. Make the embedding with sparse=False, or leave it out."
        )
    if lacks_anchor:
        raise FastlockError(
            f"{_name(group, place)} has no anchor: it was added, unfrozen or replaced after anchor(). Call anchor() "
            "once more, or give its group pull=0."
        )


def check_loaded(groups: list[dict[str, Any]], state: dict[torch.Tensor, dict[str, Any]]) -> None:
    """What was loaded fits the parameters, and nothing of it was lost.

    Raises:
        FastlockError: a moment or an anchor has another shape, or an anchor is missing; or as `check_group` does.
        UnsupportedError: it is the state of another algorithm.
    """
    for i, group in enumerate(groups):
        for name in ("amsgrad", "maximize"):
            if group.get(name):
                raise UnsupportedError(f"group {i}: the state was saved with {name}, which ProximalAdamW does not do.")
        check_group(groups, i)
        for j, parameter in enumerate(group["params"]):
            _check_shapes(parameter, state.get(parameter, {}), _name(group, j))
        states = [state[parameter] for parameter in group["params"] if parameter in state]
        if group["anchored"] and states and not any("anchor" in of_parameter for of_parameter in states):
            raise FastlockError(
                f"group {i}: an anchor was saved, and it was not loaded. Call anchor() before a distributed checkpoint "
                "is loaded, to make room for it."
            )


def _check_shapes(parameter: torch.Tensor, state: dict[str, Any], name: str) -> None:
    for key in ("exp_avg", "exp_avg_sq", "anchor"):
        value = state.get(key)
        if value is not None and value.shape != parameter.shape:
            raise FastlockError(
                f"{name}: its {key} is {list(value.shape)}, not {list(parameter.shape)}; this is another model's "
                "state. Load the one that was saved with this model."
            )


def _name(group: dict[str, Any], place: int) -> str:
    """A parameter in words: by its name, where the optimizer was given names."""
    names = group.get("param_names")
    shape = list(group["params"][place].shape)
    return f"parameter {names[place]}" if names else f"parameter {place} of its group (shape {shape})"
