"""Every kind of the fold kernel against float64, and the table that all of them read."""

import dataclasses
import math
import random

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import variants
from tests.kernels.fold.sites import DEVICE, arguments, check, make_site

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CASES = [
    (kind, dtype, transposed)
    for kind in variants.KINDS
    for dtype in DTYPES
    for transposed in (False, True)
    if not variants.Variant(dtype, dtype, 128, transposed, True, kind).misfit
]
EVERY_KIND = pytest.mark.parametrize(
    ("kind", "dtype", "transposed"),
    CASES,
    ids=[
        f"{kind}-{str(dtype).removeprefix('torch.')}-{'columns' if columns else 'rows'}"
        for kind, dtype, columns in CASES
    ],
)


def aligned_site(hidden, head_dim, heads, dtype, transposed, **more):
    """Aligned whatever its size: by columns, padded to whole vectors, if the site has a multiple of them in rows."""
    vector = 16 // dtype.itemsize
    return make_site(
        -(-hidden // vector) * vector if transposed else hidden, head_dim, heads, dtype, transposed, **more
    )


@EVERY_KIND
@pytest.mark.parametrize("seed", range(2))
def test_models_of_random_shapes_in_one_launch(kind, dtype, transposed, seed):
    """Odd heights, one head and many, in any order, with a bias and without."""
    draw = random.Random(seed)
    head_dim = draw.choice([64, 80, 128])
    sites = []
    for number in range(6):
        heads = draw.sample(range(9), (1, 3, draw.randint(2, 7))[number % 3])
        hidden = draw.choice([1, 7, 33, 65, draw.randint(2, 90)])
        more = {"num_heads": 9, "bias": draw.random() < 0.5, "seed": 10 * seed + number}
        sites.append(aligned_site(hidden, head_dim, heads, dtype, transposed, **more))
    check(*sites, kind=kind)


@EVERY_KIND
def test_any_number_of_heads(kind, dtype, transposed):
    """A pair may be half, and a pipeline longer than what goes through it."""
    sites = []
    for count in range(6):
        heads = random.Random(count).sample(range(6), count)
        sites.append(aligned_site(24, 64, heads, dtype, transposed, num_heads=6, seed=count))
    check(*sites, kind=kind)


@EVERY_KIND
def test_head_sizes(kind, dtype, transposed):
    for head_dim in (8, 96, 256, 512):
        if not variants.Variant(dtype, dtype, head_dim, transposed, True, kind).misfit:
            check(aligned_site(40, head_dim, (3, 0, 1), dtype, transposed), kind=kind)


@EVERY_KIND
def test_same_bits_from_run_to_run(kind, dtype, transposed):
    sites = [aligned_site(70, 80, (4, 0, 1), dtype, transposed, seed=seed) for seed in (1, 2)]
    table = fold.build_table(*arguments(sites), kind)
    results = []
    for _ in range(2):
        for site in sites:
            site.out.fill_(math.nan)
        fold.launch(table)
        results.append([site.out.clone() for site in sites])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY_KIND
def test_flags_are_the_callers(kind, dtype, transposed):
    """Sites are folded in another order than they are given; each flag is where its site is."""
    counts = [1, 3, 2, 0, 3]
    sites = [
        aligned_site(50, 64, range(count), dtype, transposed, num_heads=3, seed=seed)
        for seed, count in enumerate(counts)
    ]
    table = fold.build_table(*arguments(sites), kind)
    for bad in ([1], [0, 3, 4]):
        for number in bad:
            sites[number].bias[-1] = math.inf
        fold.launch(table)
        assert table.flags.tolist() == [1, *(int(number in bad) for number in range(5))]
        table.flags.zero_()
        for number in bad:
            sites[number].bias[-1] = 0


def test_sites_with_most_heads_come_first():
    """Alike ones as they were given; a row has the addresses of its site's first two heads."""
    counts = [1, 4, 0, 2, 4, 3]
    sites = [make_site(33, 64, range(count), num_heads=4, seed=seed) for seed, count in enumerate(counts)]
    table = fold.build_table(*arguments(sites))
    order = [1, 4, 5, 3, 0, 2]
    assert [row[-1] for row in table.sites.tolist()] == [sites[number].out.data_ptr() for number in order]
    for row, number in zip(table.sites.tolist(), order, strict=True):
        stride, hidden, head, next_head, first, count_and_site, bias, _ = row
        addresses = [sites[number].weight.data_ptr() + 2 * 64 * i for i in range(counts[number])]
        assert (stride, hidden, bias) == (4 * 64, 33, sites[number].bias.data_ptr())
        assert [head, next_head] == [*addresses, 0, 0][:2]
        assert count_and_site == counts[number] + number * 2**32
        assert table.heads[first : first + counts[number]].tolist() == addresses
    assert (table.sites.data_ptr() % 64, table.sites.stride(0) * 8) == (0, 64)
    check(*sites)


@pytest.mark.parametrize("kind", list(variants.KINDS))
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_more_sites_than_the_grid_has_in_y(monkeypatch, kind, count):
    """The rest is in z; what fills it up folds nothing."""
    monkeypatch.setattr(fold, "MOST_IN_Y", 3)
    sites = [make_site(8 + 8 * number, 64, (number % 3,), seed=number) for number in range(count)]
    table = fold.build_table(*arguments(sites), kind)
    blocks, in_y, in_z = table.grid
    assert in_y <= 3
    assert len(table.sites) == in_y * in_z < count + in_z
    assert blocks == -(-(8 * count) // 32)
    check(*sites, kind=kind)


def test_the_default_is_what_the_table_says(monkeypatch):
    """For aligned weights, and for the head sizes that it fits; else there is another one."""
    rows = make_site(40, 64, (0,))
    for kind in variants.KINDS:
        monkeypatch.setitem(variants.DEFAULT_KINDS, (torch.bfloat16, False), kind)
        assert fold.build_table(*arguments([rows])).variant.kind == kind
    assert fold.build_table(*arguments([make_site(40, 64, (0,), offset=1)])).variant.kind == "serial"
    for dtype in DTYPES:
        for head_dim in (*variants.HEAD_DIMS, 1, 20, 257, 512):
            for transposed in (False, True):
                for aligned in (False, True):
                    assert not variants.default_variant(dtype, dtype, head_dim, transposed, aligned).misfit


def test_what_a_kind_cannot_read_is_refused():
    with pytest.raises(FastlockError, match="there is no kind 'quick'"):
        fold.build_table(*arguments([make_site(40, 64, (0,))]), "quick")
    with pytest.raises(UnsupportedError, match="pairs cannot read these weights: it reads 16 bytes at a time"):
        fold.build_table(*arguments([make_site(40, 64, (0,), offset=1)]), "pairs")
    with pytest.raises(UnsupportedError, match="it would take 128 KB of shared memory"):
        fold.build_table(*arguments([make_site(8, 512, (0,), torch.float32)]), "staged")


def test_names_tell_kinds_apart():
    names = [variant.name for variant in variants.variants()]
    assert len(set(names)) == len(names)
    assert {name.rpartition("-")[2] for name in names} == set(variants.KINDS)


def test_wheels_have_the_defaults_and_what_is_timed():
    shipped = [variant for variant in variants.variants() if variants.shipped(variant)]
    timed = {v.kind for v in shipped if (v.dtype, v.head_dim, v.transposed) == (torch.bfloat16, 128, False)}
    assert timed == set(variants.KINDS)
    assert all(variant.aligned for variant in shipped)
    others = [dataclasses.replace(v, kind="") for v in shipped]
    assert set(others) == {
        variants.Variant(dtype, dtype, head_dim, transposed, True, "")
        for dtype in DTYPES
        for head_dim in variants.HEAD_DIMS
        for transposed in (False, True)
    }
    assert len(others) == len(set(others)) + len(variants.KINDS) - 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@EVERY_KIND
def test_kinds_on_the_device(kind, dtype, transposed):
    """Large enough that every multiprocessor has programs of several sites."""
    heads = [(5, 17, 31, 2), (1,), (30, 0), (7, 6, 5, 4, 3, 2, 1)]
    check(
        *(
            aligned_site(4096, 128, of_site, dtype, transposed, num_heads=32, seed=seed)
            for seed, of_site in enumerate(heads)
        ),
        kind=kind,
    )
