"""The kernel for gates against float64: on the GPU where there is one, else in Triton's interpreter."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold import launch as kernels
from fastlock.kernels.gate_fold.launch import Chunk, chunks_of
from tests.kernels.gate_fold.made import DEVICE, check, make, matrix, run


@pytest.mark.parametrize(
    ("dtype", "rank", "hidden", "sites"),
    [(torch.float16, 2, 70, 4), (torch.bfloat16, 1, 20, 4), (torch.float32, 7, 20, 2)],
)
def test_sites_of_all_kinds_in_one_launch(dtype, rank, hidden, sites) -> None:
    """Heads, sizes, ranks and padding differ; in place or elsewhere, kept or not, with a constant part or none."""
    made = [
        make(hidden, 32, (0, 2, 3, 4, 5, 6), rank, dtype, constant=True, seed=1),
        make(hidden // 2, 16, (5, 1, 2), 1, dtype, to=(2, 0, 4), seed=2),
        make(1, 8, (0,), rank, dtype, to=(1,), keep=False, constant=True, pad=16, seed=3),
        make(9, 32, (), 1, dtype, seed=4),
    ]
    table = check(*made[:sites])
    lanes = {1: 2, 2: 4, 7: 8}[rank]
    assert (table.variant.lanes, table.variant.aligned, table.variant.shape) == (lanes, True, "narrow")
    assert table.grid == (-(-hidden // 32), sites, 1)
    assert table.flags.tolist() == [0] * (1 + sites)


@pytest.mark.parametrize(("dtype", "layout"), [(torch.bfloat16, {"transposed": True}), (torch.float32, {"pad": 3})])
def test_columns_in_memory_and_addresses_between_16_bytes(dtype, layout) -> None:
    table = check(
        make(17, 20, (1, 2, 3, 4, 5, 6, 7), 1, dtype, constant=True, seed=1, **layout),
        make(5, 6, (0, 3), 1, dtype, to=(1, 0), keep=False, offset=1, seed=2, **layout),
    )
    assert (table.variant.aligned, table.variant.transposed) == (False, "transposed" in layout)


def test_aligned_columns_in_memory() -> None:
    table = check(make(24, 48, (1, 2, 4), 2, torch.float16, transposed=True))
    assert (table.variant.aligned, table.variant.transposed) == (True, True)


def test_many_columns_side_by_side_are_read_in_long_pieces() -> None:
    wide = make(6, 64, range(1, 33), to=range(32))
    table = check(wide)
    assert (table.variant.shape, table.grid, len(table.chunks)) == ("wide", (2, 1, 1), 2)
    scattered = make(6, 64, range(0, 64, 2))
    assert kernels._variant_for([scattered.site], None).shape == "narrow", "most of a long piece would be empty"


def test_heads_side_by_side_are_one_run() -> None:
    site = make(4, 48, (1, 2, 3, 6, 0), to=(0, 1, 2, 3, 6)).site
    assert chunks_of(site, 100) == [
        Chunk(48, 0, 0, 100),
        Chunk(148, 100, 100, 44),
        Chunk(288, 144, 144, 48),
        Chunk(0, 288, 192, 48),
    ]
    assert chunks_of(make(4, 48, ()).site, 100) == []


def test_from_what_was_kept_the_same_bits_again() -> None:
    """A first relock in place keeps what was there; from that, the next ones write the same into W."""
    first = make(20, 16, (3, 0, 1))
    check(first)
    written = first.written
    first.site.target.matrix[:, :16] = 0
    kept = HeadColumns.side_by_side(first.site.kept, 16)
    run(dataclasses.replace(first, site=dataclasses.replace(first.site, columns=kept, kept=None)))
    assert torch.equal(first.written, written)


def test_a_table_can_be_launched_again() -> None:
    made = make(20, 16, (0, 2), to=(0, 1))
    table = run(made)
    made.site.columns.matrix[:, :16] *= 2
    made.before = torch.cat([made.site.columns.matrix[:, :16], made.site.columns.matrix[:, 32:48]], dim=1)
    kernels.launch(table)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    again = made.written.clone()
    check(made)
    assert torch.equal(made.written, again)


def test_what_is_not_finite_is_flagged_site_by_site() -> None:
    """In whichever chunk and row; a number that only rounding makes infinite; a bias; nothing that is not locked."""
    made = [make(20, 48, (0, 2, 3, 4), 1, torch.float16, constant=seed > 2, seed=seed) for seed in range(5)]
    made[0].site.columns.matrix[19, 4 * 48 + 47] = math.inf
    made[2].site.columns.matrix[3, 0] = 65504
    made[2].site.writers[0, 0, 0], made[2].site.readers[0, 3, 5] = 1.0, 2.0
    made[4].site.bias[0] = math.nan
    assert run(*made).flags.tolist() == [1, 1, 0, 1, 0, 1]


def test_weights_beyond_2_to_the_31_elements() -> None:
    """Addresses are 64 bits wide: the third row starts past the largest int32."""
    row = 2**30 + 8
    storage = torch.empty(2 * row + 64, dtype=torch.bfloat16, device=DEVICE)  # untouched pages cost nothing
    far = storage.as_strided((3, 64), (row, 1))
    made, expected = (make(3, 16, (1,)) for _ in range(2))
    far[:, 16:32] = made.before
    run(expected)
    run(dataclasses.replace(made, site=dataclasses.replace(made.site, columns=HeadColumns(far, (16,)))))
    assert torch.equal(made.written, expected.written)


def test_more_sites_than_a_grid_has_in_y(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MOST_IN_Y", 2)
    table = check(*(make(8, 16, (0,), seed=seed) for seed in range(3)))
    assert (table.grid, len(table.sites)) == ((1, 2, 2), 4), "an empty one at the end"


def test_sites_of_one_layer_share_their_vectors_and_all_is_one_buffer() -> None:
    one, other = make(9, 16, (0, 1), to=(0, 1), seed=1), make(20, 16, (2, 5), to=(0, 1), seed=2)
    other.site = dataclasses.replace(other.site, readers=one.site.readers, writers=one.site.writers)
    again = make(9, 16, (0, 1), to=(0, 1), seed=3)
    again.site = dataclasses.replace(again.site, readers=one.site.readers, writers=one.site.writers)
    table = check(one, other, again)
    assert (len(table.chunks), len(table.vectors)) == (4, 3), "once for side by side, once for two chunks"
    parts = (table.sites, table.chunks, table.vectors)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert all(part.data_ptr() % 16 == 0 for part in parts)


BAD = {
    "not torch.float64": {"columns": HeadColumns(torch.zeros(40, 64, dtype=torch.float64), (0, 32))},
    "contiguous rows": {"columns": HeadColumns(torch.zeros(40, 128, dtype=torch.bfloat16)[:, ::2], (0, 32))},
    "one dtype, device and layout": {"target": HeadColumns(torch.zeros(40, 64), (0, 32))},
    "the target is": {"target": HeadColumns(torch.zeros(64, 40, dtype=torch.bfloat16).t(), (0, 32))},
    "the target has 39 rows": {"target": HeadColumns(torch.zeros(39, 64, dtype=torch.bfloat16), (0, 32))},
    "weight has 64 columns": {"target": HeadColumns(torch.zeros(40, 64, dtype=torch.bfloat16), (0, 49))},
    "1 locked heads": {"target": HeadColumns(torch.zeros(40, 64, dtype=torch.bfloat16), (0,))},
    "and overlap": {"target": HeadColumns(torch.zeros(40, 64, dtype=torch.bfloat16), (0, 8))},
    "kept is": {"kept": torch.zeros(40, 31, dtype=torch.bfloat16)},
    "kept is torch.float32": {"kept": torch.zeros(40, 32)},
    "rank 0": {"readers": torch.zeros(0, 2, 16), "writers": torch.zeros(0, 2, 16)},
    "rank 9": {"readers": torch.zeros(9, 2, 16), "writers": torch.zeros(9, 2, 16)},
    "rank 8": {"readers": torch.zeros(8, 2, 16), "writers": torch.zeros(8, 2, 16)},
    "both must be": {"writers": torch.zeros(2, 2, 16)},
    "but values": {"values": torch.zeros(1, 16)},
    "or neither": {"out": None},
    "the bias is": {"bias": torch.zeros(40)},
    "out is": {"out": torch.zeros(39, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("message", BAD)
def test_refuses_what_it_would_misread(message) -> None:
    """With a constant part, rank 8 takes nine lanes."""
    good, bad = make(40, 16, (0, 2)), make(40, 16, (0, 2), constant=True)
    bad.site = dataclasses.replace(bad.site, **{name: there(value) for name, value in BAD[message].items()})
    with pytest.raises(FastlockError, match=message) as error:
        run(*((bad, good) if "float64" in message else (good, bad)))
    unsupported = message in ("not torch.float64", "contiguous rows", "rank 9", "rank 8")
    assert isinstance(error.value, UnsupportedError) == unsupported
    assert good.site.kept.isnan().all()


def there(value):
    if isinstance(value, HeadColumns):
        return HeadColumns(value.matrix.to(DEVICE), value.starts)
    return value if value is None or value.dim() == 3 else value.to(DEVICE)


def test_no_site_and_no_such_shape() -> None:
    with pytest.raises(FastlockError, match="no site"):
        run()
    with pytest.raises(FastlockError, match="no shape 'long'"):
        run(make(4, 16, (0,)), shape="long")
    with pytest.raises(UnsupportedError, match="by rows, aligned"):
        run(make(4, 16, (0,), transposed=True), shape="wide")


def test_what_there_is_a_kernel_for() -> None:
    assert kernels.takes(make(4, 16, (0,), 8).site)
    assert not kernels.takes(make(4, 16, (0,), 8, constant=True).site)
    assert not kernels.takes(make(4, 16, (0,), dtype=torch.float64).site)
    _, strided = matrix(4, 64, torch.float32)
    site = make(4, 16, (0,), dtype=torch.float32).site
    assert not kernels.takes(dataclasses.replace(site, kept=strided[:, :16].t().contiguous().t()))
    assert not kernels.takes(dataclasses.replace(site, columns=HeadColumns(strided[:, ::2], (0,))))
