"""Every way of the projection with a lock per row against float64: on the GPU, else in Triton's interpreter."""

import dataclasses
import math

import pytest
import torch

from fastlock.kernels.locked_linear import tiles

pytest.importorskip("triton")

from fastlock.kernels.locked_linear import launch as locked_linear
from fastlock.kernels.locked_linear import triton_kernels as locked_linear_jit
from fastlock.kernels.locked_linear.launch import run
from fastlock.kernels.locked_linear.tiles import Way
from tests.kernels.locked_linear.truth import (
    ADD,
    AROUND,
    BROAD,
    DEVICE,
    DTYPES,
    EVERY,
    GATHER,
    READ_PADDING,
    SHIFT,
    SMALL,
    TALL,
    bound,
    check,
    compute,
    dense,
    make,
    named,
    truth_of,
)


@pytest.fixture(autouse=True)
def _float32_sums():
    """As the bounds say: cuBLAS may else add parts of 16-bit sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("way", EVERY, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_heads", "head_dim", "hidden"), [(1, 2, 16, 1), (17, 3, 48, 63), (63, 2, 32, 17), (5, 4, 80, 40)]
)
def test_shapes(rows, num_heads, head_dim, hidden, dtype, way):
    pad = 0 if way in (GATHER, *READ_PADDING) else 16
    check(way, make(rows, num_heads, head_dim, hidden, dtype, pad=pad))


@pytest.mark.parametrize("way", EVERY, ids=named)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts(way, transposed, bias):
    check(way, make(20, 3, 16, 50, bias=bias, transposed=transposed, pad=3))


@pytest.mark.parametrize("way", EVERY, ids=named)
def test_long_sides(way):
    check(way, make(3, 2, 16, 1000))
    check(way, make(1000, 2, 16, 8))


@pytest.mark.parametrize("tile", [SMALL, BROAD, TALL], ids=lambda tile: tile.name)
@pytest.mark.parametrize("kind", ["gather", "shift"])
@pytest.mark.parametrize("rows", [15, 16, 65])
def test_edges_of_tiles(kind, tile, rows):
    for num_heads, head_dim in ((2, 32), (3, 16)):
        if kind == "gather" or head_dim % tile.width == 0:
            check(Way(kind, tile), make(rows, num_heads, head_dim, 65))


@pytest.mark.parametrize("width", [8, 20, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_width_that_no_step_divides(width, transposed):
    """Heads of 4, 10 and 33 columns: whatever is no multiple of 16 cannot be shifted as it is read."""
    inputs = make(9, 33 // width if width == 33 else 2, width // (1 if width == 33 else 2), 24, transposed=transposed)
    assert tiles.shift_tiles([SMALL], inputs.head_dim, torch.float32) == []
    for way in (GATHER, ADD, AROUND):
        check(way, inputs)


def tiles_launched():
    shared = 227 * 1024
    found = [
        (dtype, tile)
        for dtype in (torch.bfloat16, torch.float32)
        for rows in (1, 32, 64, 512, 4096)
        for tile in tiles.tiles(dtype, rows, 9, shared)
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("dtype", "tile"), tiles_launched(), ids=str)
def test_every_tile_that_is_launched(dtype, tile):
    """Over more than one of it each way; the columns of the large ones are finished in halves."""
    locks = [0, 0, 1, -1, 2, 3]
    rows = 6 * math.ceil((tile.rows + 4) / 6)
    inputs = make(rows, 2, 128, tile.hidden + 20, dtype, locks)
    for way in (
        Way("gather", tile),
        *(Way("shift", narrow) for narrow in tiles.shift_tiles([tile], 128, dtype)),
    ):
        check(way, inputs)


@pytest.mark.parametrize("way", EVERY, ids=named)
def test_entries_serve_consecutive_rows(way):
    """Whole tiles of one lock, of none, and of several."""
    check(way, make(4 * 20, 2, 16, 33, locks=[2, -1, 0, 0]))
    check(way, make(48, 2, 16, 33, locks=[1]))
    check(way, make(48, 2, 16, 33, locks=[-1]))
    check(way, make(12, 2, 16, 33, locks=[0, 2, -1]))


@pytest.mark.parametrize("way", EVERY, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_lock_are_the_plain_projection(dtype, way):
    """Whatever is in the tables: nothing of it is read for them, and their bits are those of a run without locks."""
    inputs = make(20, 2, 16, 40, dtype, locks=[-1, 3, -1, -1, -1, -1, 0, 1, -1, 2])
    nan = {name: torch.full_like(getattr(inputs, name), math.nan) for name in ("values", "folds")}
    none = torch.full_like(inputs.lock_of_row, -1)
    alone = compute(way, dataclasses.replace(inputs, lock_of_row=none, **nan))
    assert alone.isfinite().all()
    y = check(way, inputs).to(alone)
    unlocked = (inputs.lock_of_row == -1).repeat_interleave(2)
    assert torch.equal(y[unlocked], alone[unlocked])
    assert not torch.equal(y[~unlocked], alone[~unlocked])
    plain = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    if way.tile is None:
        assert torch.equal(alone, plain)


def test_add_writes_locked_rows_alone():
    inputs = make(6, 2, 16, 40, locks=[-1, 0, -1])
    y = torch.full((6, 40), math.nan, device=DEVICE)
    y[2:4] = 1.0
    before = y.clone()
    locked_linear_jit.add(inputs, y)
    assert not (y[2:4] == 1.0).any()
    assert torch.equal(y.view(torch.int32)[[0, 1, 4, 5]], before.view(torch.int32)[[0, 1, 4, 5]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_holds_what_was_there(dtype):
    """NaNs, infinities and zeros come back with their bits; where no lock acts, nothing is touched meanwhile."""
    inputs = make(20, 3, 16, 8, dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 5e-8, -1.0, 65504.0], device=DEVICE)
    inputs.x[:] = odd.to(dtype).repeat(6)
    before = inputs.x.view(bits).clone()
    held = inputs.x.new_full((20, 2, 16), math.nan)
    locked_linear_jit.shift(inputs, held)
    moved = inputs.x.view(bits) != before
    shifted = dense(inputs.heads.cpu(), inputs.slots.cpu(), inputs.values.cpu(), inputs.lock_of_row.tolist()) != 0
    assert moved.any()
    assert not moved.cpu()[~shifted].any()
    locked_linear_jit.put_back(inputs, held)
    assert torch.equal(inputs.x.view(bits), before)


# By how many heads there are: the column of each head that has one, and the values of three locks.
TABLES = {
    "one head": (1, {0: 0}, [[0], [1], [-1]]),
    "one of many": (7, {4: 0}, [[0], [3], [-1]]),
    "every head": (5, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, [[0, 1, 3, 4, 0], [-1, 1, -1, 3, -1], [4, 4, 4, 4, 4]]),
    "unsorted": (6, {5: 0, 0: 2, 3: 1}, [[0, 1, 3], [-1, -1, 4], [1, -1, -1]]),
    "columns without a head": (3, {2: 1}, [[0, 1, 3], [4, -1, 0], [-1, 3, -1]]),
}


@pytest.mark.parametrize("way", EVERY, ids=named)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("rows", [1, 35])
def test_whichever_heads_are_locked(rows, table, way):
    num_heads, columns, slots = TABLES[table]
    check(way, make(rows, num_heads, 16, 23, columns=columns, slots=slots, locks=[0, 2, -1, 1, 0][: 1 + rows // 8]))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_adds_each_head_its_own(dtype, head_dim, table):
    """Head by head, against d element by element; what it holds, too."""
    num_heads, columns, slots = TABLES[table]
    inputs = make(37, num_heads, head_dim, 4, dtype, columns=columns, slots=slots, pad=8)
    before = inputs.x.clone()
    held = before.new_full((37, len(slots[0]), head_dim), math.nan)
    locked_linear_jit.shift(inputs, held)
    lock = inputs.lock_of_row.tolist()
    d = dense(inputs.heads.cpu(), inputs.slots.cpu(), inputs.values.cpu(), lock)
    exact = before.cpu().double() + d * inputs.strength_of_row.cpu().double()[:, None]
    # A float32 sum, then a rounding; Triton's interpreter cuts bfloat16 off.
    size = before.cpu().double().abs() + (d * inputs.strength_of_row.cpu().double()[:, None]).abs()
    assert ((inputs.x.cpu().double() - exact).abs() <= (torch.finfo(dtype).eps + 2.0**-22) * size + 2.0**-24).all()
    for row in range(37):
        for head, column in columns.items():
            if lock[row] >= 0 and slots[lock[row]][column] >= 0:
                assert torch.equal(held[row, column], before[row, head * head_dim : (head + 1) * head_dim])
            else:
                assert held[row, column].isnan().all()
    assert held[:, sorted(set(range(len(slots[0]))) - set(columns.values()))].isnan().all()
    locked_linear_jit.put_back(inputs, held)
    assert torch.equal(inputs.x, before)


def test_there_are_programs_for_locked_columns_alone(monkeypatch):
    """Of 64 heads two are locked: two programs for each 32 rows, or 16 of a large head, there and back."""
    kernel, grids = locked_linear_jit.shift_kernel, []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(locked_linear_jit, "shift_kernel", Kernel())
    check(AROUND, make(70, 64, 16, 4, columns={60: 0, 3: 1}))
    check(AROUND, make(35, 3, 256, 4))
    assert grids == [(3, 2)] * 4


@pytest.mark.parametrize("way", EVERY, ids=named)
def test_a_lock_that_there_is_not_gives_nan(way):
    """Not another lock's rows, nothing from beyond the tables, and no row without a lock; other rows are right."""
    for locks in ([0, 4, -1, -2], [4, 4, 4, 4], [2**31 - 1, 1, -(2**31), 0]):
        inputs = make(8, 2, 16, 40, locks=locks)
        y = compute(way, inputs)
        bad = torch.tensor([not -1 <= lock < 4 for lock in locks]).repeat_interleave(2)
        assert y[bad.to(y.device)].isnan().all()
        good = dataclasses.replace(inputs, lock_of_row=inputs.lock_of_row.where((inputs.lock_of_row.abs() < 4), -1))
        if not bad.all():
            truth = truth_of(good)
            close = (y.cpu().double() - truth.y).abs() <= bound(way, good, truth) + 2.0**-23 * truth.y.abs()
            assert close[~bad].all()


@pytest.mark.parametrize("way", EVERY, ids=named)
def test_x_of_any_strides(way):
    inputs = make(12, 2, 16, 40, locks=[0, 1, 2, -1, 3, 0])
    columns = inputs.x.t().contiguous().t()
    assert columns.stride(1) != 1
    check(way, dataclasses.replace(inputs, x=columns))
    check(way, dataclasses.replace(inputs, x=inputs.x[:1].expand(12, -1)))
    check(way, dataclasses.replace(inputs, x=inputs.x.repeat(2, 1)[::2]))


@pytest.mark.parametrize("way", [GATHER, SHIFT], ids=named)
def test_same_bits_from_run_to_run(way):
    inputs = make(20, 2, 32, 70, torch.bfloat16)
    first = compute(way, inputs)
    assert all(torch.equal(compute(way, inputs), first) for _ in range(3))


@pytest.mark.parametrize("way", [GATHER, SHIFT, AROUND], ids=named)
def test_beyond_2_to_the_31_elements(way):
    """Addresses are 64 bits wide: the third row of x, or of W, starts past the largest int32."""
    row = 2**30 + 8
    for name in ("x", "weight"):
        inputs = make(3, 2, 16, 3, torch.bfloat16, locks=[0, 1, 2])
        storage = torch.empty(
            2 * row + 32, dtype=torch.bfloat16, device=DEVICE
        )  # pages that nobody touches cost nothing
        far = storage.as_strided((3, 32), (row, 1))
        far.copy_(getattr(inputs, name))
        inputs = dataclasses.replace(inputs, **{name: far})
        y = compute(way, inputs).cpu().double()
        truth = truth_of(inputs)
        assert ((y - truth.y).abs() <= bound(way, inputs, truth) + 2.0**-8 * truth.y.abs()).all()


@pytest.mark.parametrize("way", EVERY, ids=named)
def test_no_rows(way):
    inputs = make(2, 2, 16, 40)
    inputs = dataclasses.replace(inputs, x=inputs.x[:0], lock_of_row=inputs.lock_of_row[:0])
    assert run(way, inputs).shape == (0, 40)


def test_x_is_as_it_was_where_the_projection_fails(monkeypatch):
    inputs = make(12, 2, 16, 40)
    before = inputs.x.clone()

    def no_memory(x, *_):
        assert not torch.equal(x, before), "the displacement must be in x for this test to mean anything"
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(locked_linear.functional, "linear", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(AROUND, inputs)
    assert torch.equal(inputs.x, before)


@pytest.mark.parametrize("way", EVERY, ids=named)
def test_a_negative_strength_gives_nan(way):
    inputs = make(4, 2, 16, 40, locks=[0, 1, -1, 2])
    inputs.strength_of_row[1] = -1.0
    y = compute(way, inputs)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
