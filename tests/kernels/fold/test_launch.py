"""The fold kernel against float64: on the GPU where there is one, else in Triton's interpreter."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.fold import launch as fold
from tests.kernels.fold.sites import DEVICE, GUARD, arguments, check, make_site, run

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEAD_DIMS = [64, 80, 96, 112, 128, 160, 192, 256]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 8, 20, 32, 1, 512])
def test_head_dims(head_dim, dtype, transposed):
    check(make_site(40, head_dim, (1, 3), dtype, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 63, 1000])
def test_hidden_sizes(hidden, transposed):
    check(make_site(hidden, 64, (0, 2), transposed=transposed))


def test_llama_shape():
    check(make_site(4096, 128, (5, 17, 31), num_heads=32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_sites_of_all_kinds_in_one_launch(dtype, transposed):
    """Sizes, strides, numbers of heads and of locked heads differ, and some have no bias."""
    check(
        make_site(63, 32, (0,), dtype, transposed, bias=False, seed=1),
        make_site(8, 32, (0, 1, 2, 3, 5), dtype, transposed, seed=2),
        make_site(1, 32, (7,), dtype, transposed, num_heads=9, seed=3),
        make_site(100, 32, (), dtype, transposed, num_heads=4, seed=4),
        make_site(65, 32, (2, 4), dtype, transposed, bias=False, pad=3, offset=1, seed=5),
        make_site(32, 32, (3,), dtype, transposed, num_heads=4, pad=8, seed=6),
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "head_dim", "offset", "pad", "aligned"),
    [
        (48, 64, 0, 0, True),
        (48, 64, 8, 16, True),
        (48, 64, 1, 0, False),
        (48, 64, 0, 1, False),
        (48, 64, 3, 5, False),
        (48, 64, 0, 2, False),
        (47, 64, 0, 0, None),  # by columns no vector ends where a column does
        (48, 18, 0, 0, None),  # by rows no vector ends where a head does
    ],
)
def test_alignment(hidden, head_dim, offset, pad, aligned, dtype, transposed):
    """Wide loads where every address allows them, and the right result in either case."""
    site = make_site(hidden, head_dim, (0, 2), dtype, transposed, offset=offset, pad=pad)
    if aligned is None:
        aligned = transposed == (hidden == 48)
    assert fold.build_table(*arguments([site])).variant.aligned is aligned
    check(site)


def test_one_misaligned_site_makes_the_launch_plain():
    sites = [make_site(40, 64, (1,), offset=offset) for offset in (0, 1)]
    assert not fold.build_table(*arguments(sites)).variant.aligned
    check(*sites)


def test_same_bits_from_run_to_run():
    sites = [make_site(70, 80, (0, 1, 4), seed=seed) for seed in (1, 2)]
    run(*sites)
    first = [site.out.clone() for site in sites]
    for _ in range(3):
        for site in sites:
            site.out.fill_(math.nan)
        run(*sites)
        assert all(torch.equal(site.out, before) for site, before in zip(sites, first, strict=True))


def test_result_may_replace_the_bias():
    site = make_site(50, 64, (0, 1), torch.float32)
    check(site)
    expected = site.out.clone()
    fold.fold_sites([site.columns], [site.values], [site.bias], [site.bias])
    assert torch.equal(site.bias, expected)


def test_no_locked_head_leaves_the_bias():
    site = make_site(50, 64, (), num_heads=2)
    run(site)
    assert torch.equal(site.out, site.bias.to(site.out.dtype))


def test_no_site_is_no_launch():
    fold.fold_sites([], [], [], [])


def test_float32_values_and_parameters():
    site = make_site(40, 64, (1,), torch.float32)
    site = dataclasses.replace(
        site, weight=torch.nn.Parameter(site.weight), bias=torch.nn.Parameter(site.bias), values=site.values.float()
    )
    check(site)


def test_weights_beyond_2_to_the_31_elements():
    """Addresses are 64 bits wide: the third row starts past the largest int32."""
    row = 2**30 + 8
    storage = torch.empty(2 * row + 128, dtype=torch.bfloat16, device=DEVICE)  # pages that nobody touches cost nothing
    weight = storage.as_strided((3, 128), (row, 1))
    weight[:] = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(weight)
    site = make_site(3, 64, (1,))
    check(dataclasses.replace(site, weight=weight))


def test_table_is_one_aligned_buffer():
    """One copy to the device brings it all, and the compiled kernel may count on 16-byte addresses."""
    for heads in ((0,), (0, 1), (0, 1, 2)):
        table = fold.build_table(*arguments([make_site(33, 20, heads), make_site(64, 20, (0,))]))
        parts = (table.sites, table.heads, table.values)
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        assert all(part.data_ptr() % 16 == 0 for part in parts)
        assert [part.dtype for part in parts] == [torch.int64, torch.int64, torch.float32]
        assert table.grid == (64 // table.variant.block_rows, 2, 1)


def test_table_can_be_launched_again():
    site = make_site(40, 64, (0, 2))
    table = fold.build_table(*arguments([site]))
    fold.launch(table)
    first = site.out.clone()
    site.weight[:, :64] *= 2
    fold.launch(table)
    assert not torch.equal(site.out, first)
    check(site)


def test_other_displacements_of_the_same_heads():
    sites = [make_site(40, 64, (0, 2), seed=1), make_site(33, 64, (1,), seed=2)]
    table = fold.build_table(*arguments(sites))
    values = [torch.randn_like(site.values) for site in sites]
    table.displace(values)
    fold.launch(table)
    again = [site.out.clone() for site in sites]
    sites = [dataclasses.replace(site, values=v) for site, v in zip(sites, values, strict=True)]
    check(*sites)
    assert all(torch.equal(site.out, before) for site, before in zip(sites, again, strict=True))


def flags_of(table):
    fold.launch(table)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return table.flags.tolist()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_flagged_site_by_site(bad, dtype, transposed):
    """In whichever block of rows; what is in no locked column does not count."""
    sites = [make_site(100, 64, (0, 2), dtype, transposed, num_heads=4, seed=seed) for seed in range(4)]
    sites[0].weight[7, 64] = bad
    table = fold.build_table(*arguments(sites))
    assert flags_of(table) == [0, 0, 0, 0, 0]
    sites[1].weight[0, 2 * 64 + 5] = bad
    sites[3].bias[99] = bad
    assert flags_of(table) == [1, 0, 1, 0, 1]
    sites[3].bias[99] = 1
    table.flags.zero_()
    assert flags_of(table) == [1, 0, 1, 0, 0]


def test_what_overflows_only_in_the_result_is_flagged():
    """float32 sums that float16 cannot hold; large ones that it can are finite."""
    largest = torch.finfo(torch.float16).max
    for top, flag in ((largest, 0), (2.0 * largest, 1)):
        site = make_site(40, 64, (0,), torch.float16, bias=False)
        site.weight[:, :64] = 1
        site = dataclasses.replace(
            site,
            values=torch.full((1, 64), top / 64),
            guarded=torch.zeros(40 + 2 * GUARD, dtype=torch.float16).to(DEVICE),
        )
        assert flags_of(fold.build_table(*arguments([site]))) == [flag, flag]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(40, 256, dtype=torch.float64)}, "not torch.float64"),
        ({"weight": torch.zeros(40, 256)}, "one dtype"),
        ({"weight": torch.zeros(40, 512, dtype=torch.bfloat16)[:, ::2]}, "contiguous rows"),
        ({"weight": torch.zeros(256, 40, dtype=torch.bfloat16).t()}, "layout"),
        ({"heads": (0, 4)}, "256 columns"),
        ({"heads": (-1, 2)}, "256 columns"),
        ({"heads": (0,)}, "1 heads of 64 columns"),
        ({"values": torch.zeros(2, 32)}, "2 heads of 64 columns"),
        ({"bias": torch.zeros(40)}, "the bias"),
        ({"bias": torch.zeros(41, dtype=torch.bfloat16)}, "the bias"),
        ({"guarded": torch.zeros(39 + 2 * GUARD)}, "out"),
        ({"guarded": torch.zeros(40 + 2 * GUARD, dtype=torch.float64)}, "out"),
    ],
)
def test_refuses_what_it_would_misread(change, message):
    good, bad = (make_site(40, 64, (0, 2), num_heads=4, seed=seed) for seed in (1, 2))
    change = {
        name: value.to(DEVICE) if name in ("weight", "bias", "guarded") else value for name, value in change.items()
    }
    bad = dataclasses.replace(bad, **change)
    sites = (bad, good) if "float64" in message else (good, bad)
    with pytest.raises(FastlockError, match=message) as error:
        run(*sites)
    assert isinstance(error.value, UnsupportedError) == (message in ("not torch.float64", "contiguous rows"))
    assert good.guarded.isnan().all()


def test_refuses_lists_of_different_lengths():
    columns, *others = arguments([make_site(40, 64, (0,))])
    with pytest.raises(FastlockError, match="one entry"):
        fold.fold_sites(columns * 2, *others)


def test_refuses_large_heads():
    with pytest.raises(UnsupportedError, match="head_dim is 513"):
        run(make_site(4, 513, (0,)))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_refuses_cpu_weights():
    site = make_site(40, 64, (0,))
    with pytest.raises(UnsupportedError, match="CUDA"):
        run(dataclasses.replace(site, weight=site.weight.cpu()))
