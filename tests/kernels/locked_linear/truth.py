"""Inputs for the projection with a lock per row, what is true of them, and how far each way may be from it."""

import dataclasses
import math

import torch

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


def _reads_padding():
    """Whether torch's own product reads what lies behind rows of x: oneDNN 3.12 multiplies it by 0 on CPUs with AMX."""
    x = torch.full((17, 160), math.nan, dtype=torch.bfloat16, device=DEVICE)[:, :144].zero_()
    return bool(torch.nn.functional.linear(x, torch.ones(63, 144, dtype=x.dtype, device=DEVICE)).isnan().any())


# The ways whose product is torch's, where that makes NaN of NaN in padding.
READ_PADDING = [ADD, AROUND, BY_TORCH] if _reads_padding() else []
# Lock 0 shifts the first head and the last, 1 the first, 2 the last, 3 none.
SLOTS = [[0, 1], [3, -1], [-1, 4], [-1, -1]]


def named(way):
    return way.name


def make(
    rows,
    num_heads,
    head_dim,
    hidden,
    dtype=torch.float32,
    locks=None,
    bias=True,
    transposed=False,
    pad=0,
    seed=0,
    columns=None,
    slots=SLOTS,
):
    """Random numbers; NaN in the padding of x and W and in a value that no lock has. Head 1 and others are not locked.

    locks: of each entry; by default one a row, of all kinds.
    columns, slots: the column of each head that has one, by head, and its value for each lock; by default the first
        head's and the last's, and SLOTS.
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
    for head, column in (columns or {0: 0, num_heads - 1: 1}).items():
        heads[head] = column
    slots = torch.tensor(slots, dtype=torch.int32)
    values = normal(5, head_dim)
    values[2] = math.nan
    weight = padded(width, hidden).t() if transposed else padded(hidden, width)
    folds = torch.zeros(len(slots), hidden, dtype=torch.float64)
    for lock, d in enumerate(dense(heads, slots, values, range(len(slots)))):
        folds[lock] = weight.cpu().double() @ d
    if locks is None:
        locks = (torch.randint(-1, len(slots), (rows,), generator=generator)).tolist()
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
