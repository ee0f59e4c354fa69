"""A kernel for adapters that is wrong is found out on adapters of our own, before it writes a result."""

import math

import pytest
import torch

from fastlock.kernels.adapter_fold import launch as kernels
from fastlock.kernels.adapter_fold.reference import LowRankSite, adapter_error_bound, fold_adapter_sites
from fastlock.kernels.adapter_fold.self_check import check_adapters, made_up
from fastlock.kernels.adapter_fold.variants import AdapterVariant, adapter_variants
from fastlock.kernels.ahead_of_time.ways import WAYS, NoWayError, WrongResultError
from tests.kernels.adapter_fold.made import DEVICE, Layer

CPU = torch.device("cpu")
F32 = torch.float32
VARIANTS = [AdapterVariant(F32, F32, True), AdapterVariant(torch.bfloat16, torch.bfloat16, False)]


def right(sites, out):
    fold_adapter_sites(sites, out)
    return torch.zeros(1 + len(sites), dtype=torch.int32)


def nothing(sites, out):
    return torch.zeros(1 + len(sites), dtype=torch.int32)


def spoiling(spoil):
    def fold(sites, out):
        flags = right(sites, out)
        spoil(sites, out, flags)
        return flags

    return fold


def without(sites, out, change):
    """As if a part of the formula were forgotten."""
    fold_adapter_sites([change(site) for site in sites], out)


def changed(**of):
    def change(site):
        values = {name: value(site) for name, value in of.items()}
        return LowRankSite(**vars(site) | values)

    return spoiling(lambda sites, out, flags: without(sites, out, change))


@pytest.mark.parametrize("variant", list(adapter_variants()), ids=lambda variant: variant.name)
def test_a_right_kernel_passes(variant) -> None:
    assert check_adapters(right, variant, CPU)
    sites = made_up(variant, CPU)
    assert all(kernels.variant_of(site, variant.out_dtype) == variant for site in sites)
    assert all(site.up.isfinite().all() and len(site.up.unique()) > 200 for site in sites)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    ("fold", "words"),
    [
        (nothing, "its result was wrong: row 0"),
        (spoiling(lambda sites, out, flags: out[1][-1:].zero_()), "its result was wrong"),
        (spoiling(lambda sites, out, flags: out[0][7].fill_(math.nan)), "row 7 of"),
        (spoiling(lambda sites, out, flags: flags.fill_(1)), "its flags"),
        (spoiling(lambda sites, out, flags: out[0].as_strided((1,), (1,), 0).fill_(0)), "beside its results"),
        (changed(bias=lambda site: None), "its result was wrong"),
        (changed(scale=lambda site: 1.0), "its result was wrong"),
        (changed(shared=lambda site: site.shared * 0), "its result was wrong"),
        (changed(up=lambda site: site.up.flip(1)), "its result was wrong"),
        (changed(values=lambda site: site.values * (1 + 2**-7)), "its result was wrong"),
    ],
)
def test_a_wrong_one_is_found_out(variant, fold, words) -> None:
    with pytest.raises(WrongResultError, match=words):
        check_adapters(fold, variant, CPU)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's kernel is spoilt here")
def test_a_launch_that_writes_nothing_is_not_taken(monkeypatch) -> None:
    pytest.importorskip("triton")
    made = Layer(24, 16, (1,)).adapter(8, torch.float32)
    monkeypatch.setattr(kernels, "_ways", lambda *_: {"cubin": lambda arguments, grid: lambda: None})
    WAYS.forget()
    try:
        with pytest.warns(RuntimeWarning, match="not run by its cubin on the CPU"), pytest.raises(NoWayError):
            kernels.build_table([made.site], [made.out])
        assert made.guarded.isnan().all()
    finally:
        WAYS.forget()


def test_the_bound_is_of_the_size_of_what_is_summed() -> None:
    """A little more than one unit in the last place; it grows with s, and with the magnitudes."""
    site = Layer(50, 16, (1,)).adapter(8, torch.float32).site
    bound = adapter_error_bound(site, torch.float16)
    assert (bound < 2**-9 * (1 + site.shared.abs().double())).all()
    larger = adapter_error_bound(LowRankSite(**vars(site) | {"scale": 1e6}), torch.float32)
    assert (larger > 1e3 * adapter_error_bound(site, torch.float32)).all()
