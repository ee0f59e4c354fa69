"""The kernel for adapters against float64: on the GPU where there is one, else in Triton's interpreter."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.adapter_fold import launch as kernels
from fastlock.kernels.adapter_fold.reference import fold_adapter_sites
from fastlock.kernels.adapter_fold.variants import ALIGNED_ROWS, PLAIN_ROWS
from fastlock.kernels.fold.reference import HeadColumns
from tests.kernels.adapter_fold.made import DEVICE, Layer, check, run

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_and_layers_of_all_kinds_in_one_launch(dtype) -> None:
    """Ranks, heads, sizes and padding differ; some adapters have a β; one layer has no locked head."""
    one, other = Layer(70, 32, (0, 2)), Layer(ALIGNED_ROWS + 3, 32, (5, 1, 2), seed=1)
    table = check(
        one.adapter(16, dtype, seed=1),
        other.adapter(8, dtype, bias=True, seed=2),
        one.adapter(40, dtype, bias=True, pad=8, seed=3),
        Layer(1, 32, (), num_heads=2, seed=2).adapter(8, dtype, bias=True, seed=4),
        Layer(30, 32, (0, 2), seed=5).adapter(8, dtype, seed=5),
    )
    assert (table.variant.aligned, table.grid) == (True, (2, 5, 1))
    assert table.heads.tolist() == [0, 64, 160, 32, 64, 0, 64], "each layer once, also of the same heads"
    assert table.flags.tolist() == [0] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_ranks_sizes_strides_and_addresses(dtype) -> None:
    layer, wide = Layer(PLAIN_ROWS + 1, 20, (1,), seed=3), Layer(31, 20, (0, 2, 3), seed=4)
    table = check(
        layer.adapter(1, dtype, seed=1),
        layer.adapter(17, dtype, bias=True, offset=1, seed=2),
        wide.adapter(4, dtype, transposed=True, pad=3, seed=3),
        wide.adapter(33, dtype, transposed=True, bias=True, seed=4),
    )
    assert (table.variant.aligned, table.grid) == (False, (2, 4, 1))


def test_heads_wider_than_a_step_and_the_largest_rank() -> None:
    layer = Layer(40, 192, (1, 3))
    check(layer.adapter(256, seed=1), layer.adapter(128, torch.bfloat16, seed=2))


@pytest.mark.parametrize(
    ("rank", "dtype", "options", "aligned"),
    [
        (8, torch.bfloat16, {}, True),
        (4, torch.bfloat16, {}, False),
        (4, torch.float32, {}, True),
        (8, torch.bfloat16, {"pad": 8, "offset": 8}, True),
        (8, torch.bfloat16, {"offset": 1}, False),
        (8, torch.bfloat16, {"pad": 1}, False),
        (8, torch.bfloat16, {"transposed": True}, False),
    ],
)
def test_wide_loads_where_every_address_allows_them(rank, dtype, options, aligned) -> None:
    made = Layer(24, 16, (0, 2)).adapter(rank, dtype, **options)
    assert kernels.variant_of(made.site, made.out.dtype).aligned is aligned
    assert not kernels.variant_of(Layer(24, 18, (1,)).adapter(8).site, made.out.dtype).aligned, "a head of 36 bytes"
    between = change(made, columns=HeadColumns(made.site.columns.matrix, (2, 34)))
    assert not kernels.variant_of(between.site, made.out.dtype).aligned, "heads that begin between 16 bytes"


def test_an_adapter_that_is_there_twice_is_folded_twice_and_alike() -> None:
    layer = Layer(33, 16, (1,))
    first, again = layer.adapter(8, bias=True, seed=1), layer.adapter(8, bias=True, seed=1)
    check(first, dataclasses.replace(again, site=first.site))
    assert torch.equal(first.out, again.out)
    third = layer.adapter(8, bias=True, seed=1)
    check(third)
    assert torch.equal(third.out, first.out), "the same bits from run to run, and wherever it stands"


def test_float32_adapters_of_a_16_bit_base() -> None:
    """As PEFT trains them. (Rounding is held to its letter on a GPU: the interpreter cuts off.)"""
    made = Layer(40, 16, (1,)).adapter(8, torch.float32)
    out = torch.full((40,), math.nan, dtype=torch.float16, device=DEVICE)
    kernels.launch(kernels.build_table([made.site], [out]))
    want = torch.empty_like(out)
    fold_adapter_sites([made.site], [want])
    torch.testing.assert_close(out, want, rtol=2**-9, atol=0)


def test_what_is_not_finite_is_flagged_site_by_site() -> None:
    layer = Layer(40, 16, (1, 2))
    made = [layer.adapter(8, torch.float32, bias=True, seed=seed) for seed in range(4)]
    made[0].site.columns.matrix[3, 20] = math.inf
    made[2].site.up[39, 7] = math.nan
    made[3].site.bias[0] = -math.inf
    assert run(*made).flags.tolist() == [1, 1, 0, 1, 1]


def test_adapters_beyond_2_to_the_31_elements() -> None:
    """Addresses are 64 bits wide: the last row of A starts past the largest int32."""
    row = 2**28 + 8
    storage = torch.empty(7 * row + 64, dtype=torch.bfloat16, device=DEVICE)  # untouched pages cost nothing
    down = storage.as_strided((8, 64), (row, 1))
    expected, made = (Layer(24, 16, (1,)).adapter(8) for _ in range(2))
    down[:, 16:32] = made.site.columns.matrix[:, 16:32]
    run(expected)
    run(change(made, columns=HeadColumns(down, (16,))))
    assert torch.equal(made.out, expected.out)


def test_more_sites_than_a_grid_has_in_y(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MOST_IN_Y", 2)
    layer = Layer(20, 16, (0,))
    table = check(*(layer.adapter(8, seed=seed) for seed in range(5)))
    assert table.grid == (1, 2, 3)
    assert len(table.sites) == 6, "an empty one at the end"


def test_the_table_is_one_aligned_buffer() -> None:
    table = run(Layer(33, 20, (0, 1, 2)).adapter(8), Layer(9, 20, (1,), seed=1).adapter(3, offset=1))
    parts = (table.sites, table.heads, table.values)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert all(part.data_ptr() % 16 == 0 for part in parts)


def change(made, **changes):
    return dataclasses.replace(made, site=dataclasses.replace(made.site, **changes))


def on_device(value, device):
    if isinstance(value, HeadColumns):
        return dataclasses.replace(value, matrix=value.matrix.to(device))
    return value.to(device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": torch.zeros(40, 9, dtype=torch.bfloat16)}, "must share the rank"),
        ({"values": torch.zeros(2, 16)}, "1 heads of 16 columns, but values"),
        ({"values": torch.zeros(1, 8)}, "1 heads of 16 columns, but values"),
        ({"columns": HeadColumns(torch.zeros(8, 48, dtype=torch.bfloat16), (33,))}, "A has 48"),
        ({"columns": HeadColumns(torch.zeros(8, 48, dtype=torch.bfloat16), (-1,))}, "A has 48"),
        ({"columns": HeadColumns(torch.zeros(8, 48), (16,))}, "of one dtype"),
        ({"shared": torch.zeros(40, dtype=torch.float64)}, "shared is"),
        ({"shared": torch.zeros(41)}, "shared is"),
        ({"bias": torch.zeros(40)}, "β is"),
        ({"up": torch.zeros(8, 40, dtype=torch.bfloat16).t()}, "cannot be one launch"),
    ],
)
def test_refuses_what_it_would_misread(changes, message) -> None:
    layer = Layer(40, 16, (1,))
    good = layer.adapter(8, seed=1)
    there = {name: on_device(value, good.site.up.device) for name, value in changes.items() if name != "values"}
    bad = change(layer.adapter(8, seed=2), **changes | there)
    with pytest.raises(FastlockError, match=message):
        run(good, bad)
    assert good.guarded.isnan().all()


def test_refuses_ranks_and_dtypes_that_it_has_no_kernel_for() -> None:
    layer = Layer(4, 16, (0,))
    for made in (layer.adapter(257), layer.adapter(0), layer.adapter(8, torch.float64)):
        with pytest.raises(UnsupportedError, match=r"rank|not torch.float64"):
            run(made)


def test_no_site_is_no_table() -> None:
    with pytest.raises(FastlockError, match="0 sites and 0 results"):
        run()
