"""Parity on the device: the kernel's variants, and relocking in every family.

Each test records its largest error, in units of `reference.error_bound`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastlock
from bench.lib import machine
from bench.lib.workloads import errors
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import reference, variants
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.sites import sites_for
from tests.helpers import families

DEVICE = machine.device()
HIDDEN = 1000
HEADS = (0, 2, 3)


# Triton's JIT takes a while for each: these head sizes of what is launched by default, and fewer of the other kinds.
COMPILED_HERE, OF_OTHER_KINDS = (64, 80, 96, 128, 256), (80, 128)


def kernels() -> Iterator[Any]:
    """Every variant that is compiled ahead of time; and by the JIT every kind, aligned and plain, of some sizes."""
    for variant in variants.variants():
        if variants.shipped(variant):
            yield pytest.param("cubin", variant, id=f"cubin-{variant.name}")
        if variant.head_dim in (COMPILED_HERE if variants.is_default(variant) else OF_OTHER_KINDS):
            yield pytest.param("jit", variant, id=f"jit-{variant.name}")


@pytest.fixture
def launched_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """cubin: kernels compiled ahead of time; jit: by Triton as they are launched."""
    monkeypatch.setenv(cubins.SWITCH, "1" if request.param == "cubin" else "0")
    cubins.LOADER.forget()
    yield request.param
    cubins.LOADER.forget()


@pytest.mark.parametrize(("launched_by", "variant"), list(kernels()), indirect=["launched_by"])
def test_kernel(launched_by: str, variant: variants.Variant, record_property: Callable[..., None]) -> None:
    """One variant on one site with a bias; NaN in the columns that are not locked."""
    dtype, head_dim, transposed, aligned = variant.dtype, variant.head_dim, variant.transposed, variant.aligned
    lines, length = (5 * head_dim, HIDDEN) if transposed else (HIDDEN, 5 * head_dim)
    storage = torch.full((lines * length + 1,), math.nan, dtype=dtype, device=DEVICE)
    weight = storage[:-1] if aligned else storage[1:]
    weight = weight.view(lines, length).t() if transposed else weight.view(lines, length)
    for head in HEADS:
        weight[:, head * head_dim : (head + 1) * head_dim] = torch.randn(HIDDEN, head_dim).to(weight)
    columns = HeadColumns.in_projection(weight, HEADS, head_dim)
    values = torch.randn(len(HEADS), head_dim, dtype=torch.float64)
    bias = torch.randn(HIDDEN).to(weight)
    out = torch.full_like(bias, math.nan)
    arguments = ([columns], [values], [bias], [out])
    table = fold.build_table(*arguments, variant.kind)
    assert table.variant == variant
    if launched_by == "cubin":
        choice = cubins.LOADER.choose(variant.name, DEVICE.index or 0)
        if choice.reason.startswith("no cubin runs on"):
            pytest.skip(choice.reason)
        assert choice.kernel is not None, choice.reason
        assert isinstance(table.run, cubins.Launch)
    else:
        assert not isinstance(table.run, cubins.Launch)
    fold.launch(table)
    machine.synchronize(DEVICE)
    error = (out.double() - reference.exact_fold(columns, values, bias)).abs()
    bounds = float((error / reference.error_bound(columns, values, bias)).nan_to_num(nan=math.inf).max())
    layout = f"{'columns' if transposed else 'rows'}, {'aligned' if aligned else 'plain'}, {variant.kind}"
    what = f"kernel by {launched_by}, {str(dtype).removeprefix('torch.')}, {layout}"
    record_property("row", {"what": what, "case": f"head_dim {head_dim}", "error_in_bounds": bounds})
    assert bounds <= 1


@pytest.mark.parametrize("kind", families.CONFIGS)
def test_relock(kind: str, record_property: Callable[..., None]) -> None:
    """Relocking a tiny model of the family's real class on the device, and unlocking it bit for bit."""
    model = families.tiny_model(kind, torch.bfloat16).to(DEVICE)
    lock = families.random_lock(model)
    before, displacements = families.state(model), lock.displacement(6.0)
    columns = [site.head_columns(displacements[site.layer].heads) for site in sites_for(model, lock)]
    values = [displacement.values for displacement in displacements.values()]
    biases = [None if site.bias is None else site.bias.detach().clone() for site in sites_for(model, lock)]
    fastlock.relock(model, lock)
    folds = [site.bias for site in sites_for(model, lock)]
    error = errors(columns, values, folds, biases)["bounds"]
    record_property("row", {"what": "relock, bfloat16, every family", "case": kind, "error_in_bounds": error})
    assert error <= 1
    assert all(bias is not None and bias.device.type == DEVICE.type for bias in folds)
    fastlock.unlock(model)
    assert families.same_state(families.state(model), before)
