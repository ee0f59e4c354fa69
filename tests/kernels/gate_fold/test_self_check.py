"""A kernel for gates that is wrong is found out on weights of our own, before it writes a result."""

import dataclasses

import pytest
import torch

from fastlock.kernels.ahead_of_time.ways import WAYS, NoWayError, WrongResultError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold import launch as kernels
from fastlock.kernels.gate_fold.reference import rewrite
from fastlock.kernels.gate_fold.self_check import check_gates, made_up
from fastlock.kernels.gate_fold.variants import GateVariant, gate_variants
from tests.kernels.gate_fold.made import DEVICE, make

CPU = torch.device("cpu")
VARIANT = GateVariant(torch.bfloat16, 2, transposed=False, aligned=True, shape="narrow")


def right(sites):
    for site in sites:
        rewrite(site)
    return torch.zeros(1 + len(sites), dtype=torch.int32)


def spoiling(spoil):
    def fold(sites):
        flags = right(sites)
        spoil(sites, flags)
        return flags

    return fold


def of(**changes):
    """As if a part of the formula were forgotten: what the first site is made of, from what it was."""

    def fold(sites):
        changed = {name: change(sites[0]) for name, change in changes.items()}
        return right([dataclasses.replace(sites[0], **changed), *sites[1:]])

    return fold


@pytest.mark.parametrize(
    "variant",
    [VARIANT, *(v for v in gate_variants() if (v.lanes, v.dtype) == (1, torch.float16))],
    ids=lambda v: v.name,
)
def test_the_reference_passes_and_each_variant_is_what_launches_what_is_made_up(variant) -> None:
    assert check_gates(right, variant, CPU)
    sites = [one.site for one in made_up(variant, CPU)]
    assert kernels._variant_for(sites, variant.shape) == variant
    assert max(len(kernels.chunks_of(site, variant.block_columns)) for site in sites) > 2


@pytest.mark.parametrize(
    ("fold", "words"),
    [
        (lambda sites: torch.zeros(3, dtype=torch.int32), "its new weights were wrong"),
        (spoiling(lambda sites, flags: flags.fill_(1)), "its flags say"),
        (spoiling(lambda sites, flags: sites[0].target.matrix[:, :1].zero_()), "beside its results"),
        (spoiling(lambda sites, flags: sites[1].target.matrix[-1, 0].mul_(1.02)), "its new weights were wrong"),
        (spoiling(lambda sites, flags: sites[0].kept[-1, -1].mul_(1.01)), "what it was to keep"),
        (of(kept=lambda site: None), "what it was to keep"),
        (of(bias=lambda site: None), "its bias was wrong"),
        (of(values=lambda site: site.values * 1.02), "its bias was wrong"),
        (of(writers=lambda site: site.writers.flip(2)), "its new weights were wrong"),
        (of(readers=lambda site: site.readers.flip(1)), "its new weights were wrong"),
        (of(columns=lambda site: HeadColumns(site.columns.matrix * 2, site.columns.starts)), "were wrong"),
    ],
)
def test_a_wrong_one_is_found_out(fold, words) -> None:
    with pytest.raises(WrongResultError, match=words):
        check_gates(fold, VARIANT, CPU)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's kernel is spoilt here")
def test_a_launch_that_writes_nothing_is_not_taken(monkeypatch) -> None:
    pytest.importorskip("triton")
    made = make(24, 16, (1,))
    monkeypatch.setattr(kernels, "_ways", lambda *_: {"cubin": lambda arguments, grid: lambda: None})
    WAYS.forget()
    try:
        with pytest.warns(RuntimeWarning, match="not run by its cubin on the CPU"), pytest.raises(NoWayError):
            kernels.build_table([made.site])
        assert torch.equal(made.written, made.before)
    finally:
        WAYS.forget()
