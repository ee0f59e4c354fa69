"""Every way of the projection with a lock per row against float64: on the GPU, else in Triton's interpreter."""

import dataclasses
import math
import sys
import types

import pytest
import torch

from fastlock.kernels.locked_linear import tiles

pytest.importorskip("triton")

from fastlock.errors import UnsupportedError
from fastlock.kernels.locked_linear import launch as locked_linear
from fastlock.kernels.locked_linear import triton_kernels as locked_linear_jit
from fastlock.kernels.locked_linear.launch import run
from fastlock.kernels.locked_linear.reference import Inputs
from fastlock.kernels.locked_linear.tiles import BY_TORCH, Tile, Way

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GUARD = 40
SMALL, BROAD, TALL = Tile(16, 32, 32, 4, 2), Tile(32, 64, 16, 1, 2), Tile(64, 16, 16, 4, 2)
GATHER, SHIFT = Way("gather", SMALL), Way("shift", Tile(16, 32, 16, 4, 2))
ADD, AROUND = Way("add"), Way("around")
EVERY = [GATHER, SHIFT, ADD, AROUND, BY_TORCH]
# Lock 0 shifts the first head and the last, 1 the first, 2 the last, 3 none.
SLOTS = [[0, 1], [3, -1], [-1, 4], [-1, -1]]


@pytest.fixture(autouse=True)
def _float32_sums():
    """As the bounds say: cuBLAS may else add parts of 16-bit sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before


def named(way):
    return way.name


def make(
    rows, num_heads, head_dim, hidden, dtype=torch.float32, locks=None, bias=True, transposed=False, pad=0, seed=0
):
    """Random numbers; NaN in the padding of x and W and in a value that no lock has. Head 1 and others are not locked.

    locks: of each entry; by default one a row, of all kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    width = num_heads * head_dim

    def normal(*size):
        return torch.randn(size, generator=generator)

    def padded(lines, length):
        storage = torch.full((lines, length + pad), math.nan, dtype=dtype, device=DEVICE)
        storage[:, :length] = normal(lines, length).to(DEVICE, dtype)
        return storage[:, :length]

    def guarded(table):
        """Rows before and after that nobody may read: NaN, or a number that is no slot."""
        around = torch.full((1, table.shape[1]), math.nan if table.is_floating_point() else 10**6, dtype=table.dtype)
        return torch.cat([around, table, around])[1:-1]

    heads = torch.full((num_heads,), -1, dtype=torch.int32)
    heads[0], heads[-1] = 0, 1
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    values = normal(5, head_dim)
    values[2] = math.nan
    weight = padded(width, hidden).t() if transposed else padded(hidden, width)
    folds = torch.zeros(len(SLOTS), hidden, dtype=torch.float64)
    for lock, d in enumerate(dense(heads, slots, values, range(len(SLOTS)))):
        folds[lock] = weight.cpu().double() @ d
    if locks is None:
        locks = (torch.randint(-1, len(SLOTS), (rows,), generator=generator)).tolist()
    tables = (heads, *map(guarded, (slots, values, folds.float())), torch.tensor(locks, dtype=torch.int32))
    strengths = 6 * torch.rand(len(locks), generator=generator)
    return Inputs(
        padded(rows, width),
        weight,
        normal(hidden).to(DEVICE, dtype) if bias else None,
        *(table.to(DEVICE) for table in (*tables, strengths)),  # on a CPU the same memory, so that the guards stay
    )


def dense(heads, slots, values, locks):
    """The displacement of each lock at strength 1, element by element, [locks, width] float64."""
    head_dim = values.shape[1]
    found = torch.zeros(len(locks), len(heads) * head_dim, dtype=torch.float64)
    for row, lock in enumerate(locks):
        for head, column in enumerate(heads.tolist()):
            slot = slots[lock, column] if lock >= 0 and column >= 0 else -1
            if slot >= 0:
                found[row, head * head_dim : (head + 1) * head_dim] = values[slot].double()
    return found


@dataclasses.dataclass
class Truth:
    """In float64, all [rows, hidden]: y, y without locks, |x||W| + |c|, |s d||W|; and |W| of each column, [hidden]."""

    y: torch.Tensor
    plain: torch.Tensor
    of_x: torch.Tensor
    of_d: torch.Tensor
    of_weight: torch.Tensor


def truth_of(inputs):
    x, weight = inputs.x.detach().cpu().double(), inputs.weight.detach().cpu().double()
    c = torch.zeros(len(weight), dtype=torch.float64) if inputs.bias is None else inputs.bias.detach().cpu().double()
    d = dense(inputs.heads.cpu(), inputs.slots.cpu(), inputs.values.cpu(), inputs.lock_of_row.tolist())
    d = (d * inputs.strength_of_row.cpu().double()[:, None]).repeat_interleave(inputs.rows_per_entry, 0)
    plain = x @ weight.t() + c
    return Truth(
        plain + d @ weight.t(),
        plain,
        x.abs() @ weight.abs().t() + c.abs(),
        d.abs() @ weight.abs().t(),
        weight.abs().sum(1),
    )


def bound(way, inputs, truth):
    """How far a right result may be from the truth before it is rounded to its dtype, [rows, hidden] float64.

    A float32 sum of n terms, in any order, is within gamma_n of the sum of their magnitudes (Higham, Accuracy and
    Stability of Numerical Algorithms, eq. 3.5); n counts the roundings of s d, x + s d and of the table of folds too.
    Where x + s d is kept in x's dtype, each is off by half a unit in its last place; where y is rounded before the
    fold is added, so is y. Triton's interpreter cuts bfloat16 off, which is up to a whole unit.
    """
    info = torch.finfo(inputs.x.dtype)
    interpreted = DEVICE == "cpu" and way != BY_TORCH
    half = info.eps / 2 * (2 if interpreted and inputs.x.dtype == torch.bfloat16 else 1)
    n = inputs.weight.shape[1] + 6
    error = n * 2.0**-24 / (1 - n * 2.0**-24) * (truth.of_x + truth.of_d)
    if way == AROUND or (way.kind == "shift" and not interpreted):
        error += half * (truth.of_x + truth.of_d) + info.tiny * info.eps * truth.of_weight
    if way in (ADD, BY_TORCH):
        error += info.eps / 2 * (truth.plain.abs() + error)
    if interpreted and way == ADD and inputs.x.dtype == torch.bfloat16:
        error += info.eps * (truth.y.abs() + error)
    return error


def compute(way, inputs):
    """The result; Triton's projection writes into a guarded buffer."""
    if way.tile is None:
        return run(way, inputs)
    shape = (inputs.rows, inputs.weight.shape[0])
    # The interpreter cuts fp32 off to bf16 instead of rounding it, so there the result stays fp32.
    dtype = inputs.x.dtype if DEVICE == "cuda" else torch.float32
    guarded = torch.full((2 * GUARD + shape[0] * shape[1],), math.nan, dtype=dtype, device=DEVICE)
    y = run(way, inputs, guarded[GUARD:-GUARD].view(shape))
    assert guarded[:GUARD].isnan().all()
    assert guarded[-GUARD:].isnan().all()
    return y


def check(way, inputs, rows=slice(None)):
    """That rows lie between the roundings of truth - bound and truth + bound, and that x is as it was."""
    before = inputs.x.clone()
    y = compute(way, inputs).cpu()
    truth = truth_of(inputs)
    error = bound(way, inputs, truth)
    low, high = (truth.y - error).to(y.dtype), (truth.y + error).to(y.dtype)
    right = (low <= y) & (y <= high)
    assert right[rows].all(), ((y.double() - truth.y).abs() / error)[rows].max()
    assert torch.equal(inputs.x, before)
    return y


@pytest.mark.parametrize("way", EVERY, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_heads", "head_dim", "hidden"), [(1, 2, 16, 1), (17, 3, 48, 63), (63, 2, 32, 17), (5, 4, 80, 40)]
)
def test_shapes(rows, num_heads, head_dim, hidden, dtype, way):
    check(way, make(rows, num_heads, head_dim, hidden, dtype, pad=0 if way == GATHER else 16))


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


def test_bucket_is_the_next_power_of_two():
    rows = [1, 15, 16, 17, 32, 33, 64, 4096, 4097, 8192, 100_000]
    assert [tiles.bucket(n) for n in rows] == [16, 16, 16, 32, 32, 64, 64, 4096, 8192, 8192, 8192]


def test_shift_is_inside_one_head():
    def widths(tile, dtype=torch.bfloat16):
        found = {d: tiles.shift_tiles([tile], d, dtype) for d in (64, 80, 96, 112, 128, 192, 256, 20)}
        return {d: [narrow.width for narrow in tiles] for d, tiles in found.items()}

    large = Tile(64, 64, 128, 4, 4)
    assert widths(large) == {64: [64], 80: [16], 96: [32], 112: [16], 128: [128], 192: [64], 256: [128], 20: []}
    # 16 rows of 32 columns are 64 vectors of 8, fewer than there are threads.
    small = Tile(16, 32, 128, 4, 4)
    assert widths(small) == {64: [64], 80: [], 96: [], 112: [], 128: [128], 192: [64], 256: [128], 20: []}
    assert widths(small, torch.float32)[96] == [32]
    twice = [large, dataclasses.replace(large, width=64)]
    assert tiles.shift_tiles(twice, 64, torch.bfloat16) == [twice[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 64, 100, 4096, 10**6])
@pytest.mark.parametrize(("major", "shared"), [(8, 163), (8, 99), (9, 227), (10, 227), (12, 99)])
def test_there_is_always_a_way_that_fits(dtype, rows, major, shared):
    found = tiles.ways(dtype, rows, 128, major, shared * 1024)
    assert len(set(found)) == len(found)
    assert {way.kind for way in found} == {"gather", "shift", "add", "around", "torch"}
    assert all(way.tile is None or way.tile.shared_bytes(dtype) <= shared * 1024 for way in found)
    assert found[0].kind == ("gather" if rows <= 64 else "around")
    assert any(way.tile and way.tile.hidden == 256 for way in found) == (
        major in (9, 10) and rows > 512 and dtype != torch.float32
    )


def test_the_fastest_way_is_chosen():
    times = {GATHER: 3.0, SHIFT: 1.0, ADD: 1.0, AROUND: 2.0}
    assert locked_linear.fastest(times, times.__getitem__) == SHIFT
    assert locked_linear.fastest([ADD, SHIFT], times.__getitem__) == ADD
    assert locked_linear.fastest([GATHER, AROUND], {GATHER: math.inf, AROUND: 1.0}.__getitem__) == AROUND
    assert locked_linear.fastest([GATHER], {}.__getitem__) == GATHER


@pytest.fixture
def chooser(monkeypatch):
    """The choice on a pretended GPU: what was timed, and whether a graph is captured there."""
    state = {"timed": [], "capturing": False, "times": {GATHER: 2.0, ADD: 1.0}}

    def seconds(way, many):
        state["timed"].append(way)
        return state["times"][way]

    monkeypatch.setattr(locked_linear, "seconds", seconds)
    monkeypatch.setattr(locked_linear, "cold", lambda inputs: [inputs])
    monkeypatch.setattr(locked_linear, "ways_for", lambda inputs: list(state["times"]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    locked_linear.CHOICES.forget()
    yield state
    locked_linear.CHOICES.forget()


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_each_shape_is_timed_once(chooser):
    inputs = make(8, 2, 16, 40)
    assert locked_linear.CHOICES.of(inputs) is None
    y = locked_linear.locked_linear(inputs)
    assert chooser["timed"] == [GATHER, ADD]
    assert locked_linear.CHOICES.of(inputs) == ADD
    assert torch.equal(y, run(ADD, inputs))
    locked_linear.locked_linear(make(16, 2, 16, 40))  # as many rows, to the next power of two
    assert len(chooser["timed"]) == 2
    for other in (make(17, 2, 16, 40), make(8, 2, 16, 41), make(8, 2, 16, 40, torch.bfloat16)):
        chooser["timed"].clear()
        locked_linear.locked_linear(other)
        assert len(chooser["timed"]) == 2
    locked_linear.locked_linear(make(8, 2, 16, 40, transposed=True))
    assert len(chooser["timed"]) == 4
    every_other = dataclasses.replace(inputs, weight=torch.randn(80, 64)[::2, ::2])
    locked_linear.locked_linear(every_other)
    assert len(chooser["timed"]) == 6


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_nothing_is_timed_while_a_graph_is_captured(chooser):
    inputs = make(8, 2, 16, 40)
    chooser["capturing"] = True
    y = locked_linear.locked_linear(inputs)
    assert chooser["timed"] == []
    assert locked_linear.CHOICES.of(inputs) is None
    assert torch.equal(y, run(BY_TORCH, inputs))
    chooser["capturing"] = False
    locked_linear.locked_linear(inputs)
    assert locked_linear.CHOICES.of(inputs) == ADD


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_no_rows_decide_nothing(chooser):
    inputs = make(8, 2, 16, 40)
    none = dataclasses.replace(inputs, x=inputs.x[:0], lock_of_row=inputs.lock_of_row[:0])
    assert locked_linear.locked_linear(none).shape == (0, 40)
    assert chooser["timed"] == []
    locked_linear.locked_linear(inputs)  # of the same bucket
    assert chooser["timed"] == [GATHER, ADD]


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_weights_are_copied_only_to_be_timed(chooser, monkeypatch):
    monkeypatch.setattr(locked_linear, "cold", lambda inputs: pytest.fail("there is nothing to choose"))
    chooser["times"] = {BY_TORCH: 1.0}
    locked_linear.locked_linear(make(8, 2, 16, 40))
    assert chooser["timed"] == []


def test_what_does_not_run_is_not_chosen():
    times = {GATHER: math.inf, ADD: math.inf, BY_TORCH: math.inf}
    assert locked_linear.fastest(times, times.__getitem__) == BY_TORCH


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), torch.OutOfMemoryError("no memory")])
def test_a_way_that_fails_costs_no_more_than_a_warning(monkeypatch, error):
    def fails(way, inputs, out=None):
        raise error

    monkeypatch.setattr(locked_linear, "run", fails)
    with pytest.warns(RuntimeWarning, match=f"fastlock goes without {ADD.name} on this device: {error}"):
        assert locked_linear.seconds(ADD, [make(4, 2, 16, 40)]) == math.inf


def test_without_triton_torch_alone_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastlock.kernels.locked_linear.triton_kernels", None)
    monkeypatch.delattr("fastlock.kernels.locked_linear.triton_kernels", raising=False)
    inputs = make(4, 2, 16, 40)
    with pytest.raises(UnsupportedError, match=r"Triton, .* cannot be imported"):
        run(ADD, inputs)
    locked_linear._has_triton.cache_clear()
    assert locked_linear.ways_for(inputs) == [BY_TORCH]
    locked_linear._has_triton.cache_clear()


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


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
@pytest.mark.parametrize("transposed", [False, True])
def test_ways_are_timed_on_weights_that_left_the_cache(monkeypatch, transposed):
    inputs = make(8, 2, 16, 40, transposed=transposed)
    size = inputs.weight.numel() * inputs.weight.itemsize
    device = types.SimpleNamespace(L2_cache_size=2 * size - 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    many = locked_linear.cold(inputs)
    assert len(many) == 10
    assert len({one.weight.data_ptr() for one in many}) == 4
    assert {one.shape() for one in many} == {inputs.shape()}
    assert all(torch.equal(one.weight, inputs.weight) and torch.equal(one.x, inputs.x) for one in many)
    assert inputs.x.data_ptr() not in {one.x.data_ptr() for one in many}


def test_what_no_kernel_takes_goes_by_torch():
    double = make(4, 2, 16, 40, torch.float64)
    assert locked_linear.ways_for(double) == [BY_TORCH]
    strided = make(4, 2, 16, 80)
    strided = dataclasses.replace(strided, weight=strided.weight.repeat_interleave(2, 1)[::2, ::2], bias=None)
    assert locked_linear.ways_for(strided) == [BY_TORCH]
    wide = make(2, 2, 513, 4)
    assert locked_linear.ways_for(wide) == [BY_TORCH]
    check(
        BY_TORCH,
        dataclasses.replace(
            strided, folds=make(4, 2, 16, 40, seed=0).folds * 0, strength_of_row=strided.strength_of_row * 0
        ),
    )
