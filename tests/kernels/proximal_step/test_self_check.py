"""A kernel that is wrong is found out on tensors of our own, before it touches a weight."""

import dataclasses
import math
import re

import pytest
import torch

from fastlock.kernels.ahead_of_time.ways import WAYS, NoWayError, WrongResultError
from fastlock.kernels.proximal_step import launch, self_check
from fastlock.kernels.proximal_step.reference import proximal_gradient, proximal_step
from fastlock.kernels.proximal_step.variants import StepVariant, step_variants
from tests.kernels.proximal_step.tensors import BF16, FP32, KEPT

CPU = torch.device("cpu")
VARIANTS = [
    StepVariant(FP32, FP32, FP32),
    StepVariant(BF16, BF16, None, stochastic=True),
    StepVariant(BF16, FP32, BF16),
]


def right(tensors, change=lambda one: one):
    """What a kernel should do: float32, rounded once."""
    for one in map(change, tensors):
        wide = {name: getattr(one, name).float() for name in KEPT}
        grad, anchor = one.grad.float(), None if one.anchor is None else one.anchor.float()
        settings = dataclasses.replace(one.settings, seed=None)
        computed = dataclasses.replace(one, **wide, grad=grad, anchor=anchor, settings=settings)
        proximal_step(computed)
        for name in KEPT:
            getattr(one, name).copy_(getattr(computed, name))


def nothing(tensors):
    pass


def all_but(name):
    """One of the three is not written."""

    def run(tensors):
        kept = [getattr(one, name).clone() for one in tensors]
        right(tensors)
        for one, before in zip(tensors, kept, strict=True):
            getattr(one, name).copy_(before)

    return run


def all_but_the_last_number(tensors):
    kept = [one.weight[-1].clone() for one in tensors]
    right(tensors)
    for one, before in zip(tensors, kept, strict=True):
        one.weight[-1] = before


def not_a_number(tensors):
    right(tensors)
    tensors[1].exp_avg_sq[3] = math.nan


def beside(tensors):
    right(tensors)
    weight = tensors[2].weight
    weight.as_strided((1,), (1,), weight.storage_offset() + weight.numel()).fill_(0)


def with_settings(**settings):
    return lambda tensors: right(
        tensors, lambda one: dataclasses.replace(one, settings=dataclasses.replace(one.settings, **settings))
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_right_kernel_passes(variant) -> None:
    assert self_check.check_step(right, variant, CPU)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    ("run", "words"),
    [
        (nothing, "wrote to weight was wrong"),
        *((all_but(name), f"wrote to {name} was wrong") for name in KEPT),
        (all_but_the_last_number, "weight"),
        (not_a_number, "exp_avg_sq"),
        (beside, "beside its tensors"),
        (with_settings(lr=0.49), "weight"),
        (with_settings(beta1=0.48), "what it wrote"),
        (with_settings(beta2=0.48), "what it wrote"),
        (with_settings(weight_decay=0.2), "weight"),
    ],
)
def test_a_wrong_one_is_found_out(variant, run, words) -> None:
    with pytest.raises(WrongResultError, match=words):
        self_check.check_step(run, variant, CPU)


@pytest.mark.parametrize("settings", [{"pull": 0.7}, {"anchor_decay": 0.0}])
def test_a_term_that_is_wrong_is_found_out(settings) -> None:
    with pytest.raises(WrongResultError):
        self_check.check_step(with_settings(**settings), VARIANTS[0], CPU)


def test_a_wrong_sum_is_found_out() -> None:
    def total(tensors, factor=1.0):
        terms = (proximal_gradient(one, one.grad) for one in tensors)
        return factor * torch.stack([term.double().square().sum() for term in terms]).sum()

    assert self_check.check_norm(total, VARIANTS[0], CPU)
    for factor in (0.0, 0.999, math.nan):
        with pytest.raises(WrongResultError, match="the sum of squares was"):
            self_check.check_norm(lambda tensors, factor=factor: total(tensors, factor), VARIANTS[0], CPU)


def test_every_variant_is_made_up_of_numbers_that_can_be_kept() -> None:
    for variant in step_variants():
        tensors, guards = self_check.made_up(variant, CPU)
        assert launch.variant_of(tensors[0]) == variant
        assert all(guard.isnan().all() for guard in guards)
        lengths = [one.weight.numel() for one in tensors]
        assert max(lengths) > variant.block > min(lengths)
        for one in tensors:
            assert all(getattr(one, name).isfinite().all() for name in (*KEPT, "grad"))
            assert len(one.weight.unique()) > 200


def test_a_launch_that_writes_nothing_is_not_taken(monkeypatch) -> None:
    """It is marked, and the next way is; where none is left, it says why."""
    pytest.importorskip("triton")
    tried = []

    def broken(arguments, programs):
        return lambda: tried.append(programs)

    variant = VARIANTS[0]
    WAYS.forget()
    jit = launch._ways(variant, CPU)["jit"]
    monkeypatch.setattr(launch, "_ways", lambda *_: {"cubin": broken, "jit": jit})
    with pytest.warns(RuntimeWarning, match="step-float32-float32-float32 is not run by its cubin on the CPU"):
        assert launch.launcher_of(variant, CPU) is jit
    assert len(tried) == 1
    assert launch.launcher_of(variant, CPU) is jit
    assert len(tried) == 1
    WAYS.forget()
    monkeypatch.setattr(launch, "_ways", lambda *_: {"cubin": broken})
    with pytest.warns(RuntimeWarning), pytest.raises(NoWayError, match=re.escape("what it wrote to weight was wrong")):
        launch.launcher_of(variant, CPU)
    WAYS.forget()
