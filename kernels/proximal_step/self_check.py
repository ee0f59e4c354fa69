"""The first launch of a kernel of the step in a process, held to the reference: see `ahead_of_time.ways`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fastlock.kernels.ahead_of_time.ways import WrongResultError
from fastlock.kernels.proximal_step.reference import (
    StepSettings,
    StepTensors,
    proximal_gradient,
    proximal_step,
)
from fastlock.kernels.proximal_step.variants import StepVariant

# Steps so large that what was not written cannot pass for what should have been.
SETTINGS = StepSettings(0.5, 0.5, 0.5, 1e-3, 0.25, pull=0.75, anchor_decay=0.125)
STEP = 3.0
# In units in the last place of what is kept: one for the rounding, which may be stochastic, and one for float32.
UNITS = 2.0


def check_step(run: Callable[[Sequence[StepTensors]], object], variant: StepVariant, device: torch.device) -> bool:
    """Step some tensors of our own by the launch to be checked, and hold all of it to the reference in float32.

    Args:
        run: steps such tensors.
        variant: what they are made for.
        device: where.

    Returns:
        True.

    Raises:
        WrongResultError: what was written is wrong, or something was not written, or something else was.
    """
    tensors, guards = made_up(variant, device)
    expected = [widened(one) for one in tensors]
    for one in expected:
        proximal_step(one)
    run(tensors)
    for one, wide in zip(tensors, expected, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            got, exact = getattr(one, name).cpu(), getattr(wide, name)
            error = UNITS * torch.finfo(got.dtype).eps * exact.abs() + 1e-6
            if not ((got.float() - exact).abs() <= error).all():
                raise WrongResultError(f"what it wrote to {name} was wrong")
    if not all(guard.isnan().all() for guard in guards):
        raise WrongResultError("it wrote beside its tensors")
    return True


def check_norm(
    run: Callable[[Sequence[StepTensors]], torch.Tensor], variant: StepVariant, device: torch.device
) -> bool:
    """Sum the squares of some gradients of our own by the launch to be checked. Takes and raises as `check_step`."""
    tensors, _ = made_up(variant, device)
    exact = 0.0
    for one in map(widened, tensors):
        if one.grad is not None:
            exact += float(proximal_gradient(one, one.grad).double().square().sum())
    got = float(run(tensors))
    if not abs(got - exact) <= 1e-4 * exact:
        raise WrongResultError(f"the sum of squares was {got:.6g}, and should be {exact:.6g}")
    return True


def made_up(variant: StepVariant, device: torch.device) -> tuple[list[StepTensors], list[torch.Tensor]]:
    """Tensors of full and partial blocks, one of them at odd addresses; and the NaN around them."""
    settings = replace(SETTINGS, seed=7 if variant.stochastic else None)
    guards: list[torch.Tensor] = []
    tensors = []
    for ordinal, (length, offset) in enumerate(((2 * variant.block + 37, 0), (variant.block, 0), (300, 1))):

        def numbers(dtype: torch.dtype, seed: int, length: int = length, offset: int = offset) -> torch.Tensor:
            around = torch.full((offset + length + 64,), float("nan"), dtype=dtype, device=device)
            guards.extend((around[:offset], around[offset + length :]))
            inside = around[offset : offset + length]
            # A number of 7 bits and a sign: bfloat16 can hold it.
            inside.copy_(((torch.arange(length) * 37 + seed * 101) % 255 - 127) / 128)
            return inside

        anchor = None if variant.anchor is None else numbers(variant.anchor, 5)
        tensors.append(
            StepTensors(
                weight=numbers(variant.weight, 1),
                grad=numbers(variant.weight, 2),
                exp_avg=numbers(variant.state, 3),
                exp_avg_sq=numbers(variant.state, 4).abs_(),
                anchor=anchor,
                settings=settings,
                step=STEP,
                ordinal=ordinal,
            )
        )
    return tensors, guards


def widened(one: StepTensors) -> StepTensors:
    """A copy on the CPU, in float32, rounded nowhere else."""
    names = ("weight", "grad", "exp_avg", "exp_avg_sq", "anchor")
    copies = {name: getattr(one, name) for name in names}
    copies = {name: None if x is None else x.to("cpu", torch.float32, copy=True) for name, x in copies.items()}
    return replace(one, **copies, settings=replace(one.settings, seed=None))
