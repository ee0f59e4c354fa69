"""The projection with a lock per row as Triton source, and its launches by Triton's JIT."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from fastlock.kernels.locked_linear.reference import Inputs
from fastlock.kernels.locked_linear.tiles import Tile

# True where TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Blocks of rows whose programs run one after the other, so that they find each other's weights in the L2 cache.
GROUP = tl.constexpr(8)
# Up to this many sums of one thread, it has registers for as many numbers of the folds while it sums.
FEW_SUMS = 32
# From this many on, the columns are finished in two halves.
MANY_SUMS = 64
# Rows and columns of one program of `add_kernel`.
ADD_ROWS, ADD_COLUMNS = 4, 512
# Rows of one of `shift_kernel`, if it has registers for so many numbers. With a lock per prompt most programs find that
# it spares their column: what counts is how many waves of them there are. For 8192 rows and 16 columns of 128 numbers
# an H200 has four with 32 rows, six with 16.
SHIFT_ROWS, SHIFT_NUMBERS = 32, 4096

# Numbers of rows and locks change from call to call: Triton shall not compile a kernel for each.
CHANGING = ("rows", "rows_per_entry", "num_locks", "num_columns", "num_heads")


@triton.jit  # type: ignore[untyped-decorator]
def rows_of(
    p_lock: tl.tensor,
    p_strength: tl.tensor,
    o_m: tl.tensor,
    rows: tl.tensor,
    rows_per_entry: tl.tensor,
    num_locks: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The lock of each row, -1 where none acts, and its strength: 0 there.

    For a lock that does not exist, and for a negative strength, the strength is NaN.

    o_m: [BM] int32, the rows; those from `rows` on have no lock.
    """
    o_entry = o_m // rows_per_entry  # [BM]
    b_lock = tl.load(p_lock + o_entry, mask=o_m < rows, other=-1)
    m_lock = (b_lock >= 0) & (b_lock < num_locks)
    # Read without waiting for the lock; where none acts, whatever is there counts for nothing.
    b_strength = tl.load(p_strength + o_entry, mask=o_m < rows, other=0.0)
    b_strength = tl.where(m_lock & (b_strength >= 0), b_strength, float("nan"))
    return tl.where(m_lock, b_lock, -1), tl.where(b_lock == -1, 0.0, b_strength)


@triton.jit  # type: ignore[untyped-decorator]
def shifted(
    b_x: tl.tensor,
    p_heads: tl.tensor,
    p_slots: tl.tensor,
    p_values: tl.tensor,
    b_lock: tl.tensor,
    b_strength: tl.tensor,
    num_columns: tl.tensor,
    i_first: tl.tensor,
    o_k: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """x + s d of columns i_first + o_k, all of one head: [BM, BK], as b_x."""
    i_head = i_first // D
    i_column = tl.load(p_heads + i_head)
    if i_column >= 0:  # some lock shifts this head; one that does not exist makes x NaN
        o_slot = b_lock.to(tl.int64) * num_columns + i_column  # [BM]
        b_slot = tl.load(p_slots + o_slot, mask=b_lock >= 0, other=-1)  # [BM]
        o_d = b_slot.to(tl.int64)[:, None] * D + (i_first - i_head * D + o_k)[None, :]
        b_d = tl.load(p_values + o_d, mask=(b_slot >= 0)[:, None], other=0.0)  # [BM, BK]
        b_x = (b_x.to(tl.float32) + b_strength[:, None] * b_d).to(b_x.dtype)
    return b_x


@triton.jit  # type: ignore[untyped-decorator]
def folds_of(p_folds: tl.tensor, b_lock: tl.tensor, o_n: tl.tensor, hidden: tl.tensor) -> tl.tensor:
    """The fold of each row's lock, [BM, BN] fp32; 0 where none acts."""
    o_fold = b_lock.to(tl.int64)[:, None] * hidden + o_n[None, :]
    return tl.load(p_folds + o_fold, mask=(b_lock >= 0)[:, None] & (o_n < hidden)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def write(b_acc: tl.tensor, p_y: tl.tensor, o_m: tl.tensor, o_n: tl.tensor, rows: tl.tensor, hidden: tl.tensor) -> None:
    """Round the sums once, and write them to y. b_acc: [BM, BN] fp32."""
    o_y = o_m.to(tl.int64)[:, None] * hidden + o_n[None, :]
    tl.store(p_y + o_y, b_acc.to(p_y.dtype.element_ty), mask=(o_m < rows)[:, None] & (o_n < hidden)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def finish(
    b_acc: tl.tensor,
    p_bias: tl.tensor,
    p_folds: tl.tensor,
    p_y: tl.tensor,
    b_lock: tl.tensor,
    b_strength: tl.tensor,
    o_m: tl.tensor,
    i_n: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    BN: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Add the folds and the bias to the sums of columns [i_n, i_n + BN), round once, and write them.

    b_acc: [BM, BN] fp32.
    """
    o_n = i_n + tl.arange(0, BN)  # [BN]
    if HAS_BIAS:  # read while the folds are
        b_bias = tl.load(p_bias + o_n, mask=o_n < hidden, other=0.0)
    if not SHIFT:
        i_lock = tl.max(b_lock)
        if i_lock == tl.min(b_lock):  # one request's rows, as most of a long prompt's tiles are
            m_one = o_n < tl.where(i_lock >= 0, hidden, 0)
            b_one = tl.load(p_folds + i_lock.to(tl.int64) * hidden + o_n, mask=m_one, other=0.0)  # [BN]
            b_acc += b_strength[:, None] * b_one[None, :]
        else:
            b_acc += b_strength[:, None] * folds_of(p_folds, b_lock, o_n, hidden)
    if HAS_BIAS:
        b_acc += b_bias.to(tl.float32)[None, :]
    write(b_acc, p_y, o_m, o_n, rows, hidden)


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def gemm_kernel(  # noqa: PLR0912, PLR0915 - half of it is decided as it is compiled
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_bias: tl.tensor,
    p_heads: tl.tensor,
    p_slots: tl.tensor,
    p_values: tl.tensor,
    p_folds: tl.tensor,
    p_lock: tl.tensor,
    p_strength: tl.tensor,
    p_y: tl.tensor,
    rows: tl.tensor,
    rows_per_entry: tl.tensor,
    num_locks: tl.tensor,
    num_columns: tl.tensor,
    hidden: tl.tensor,
    width: tl.tensor,
    stride_x: tl.tensor,
    stride_w: tl.tensor,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    HALVES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program writes BM rows and BN columns of y = (x + s d) Wᵀ + c: d added to x (SHIFT), or W d to the sums.

    The tensors are those of `locked_linear.Inputs`; y is contiguous, of any dtype. stride_w: from one row of W to the
    next; from one column, if TRANSPOSED. SHIFT: BK divides D. EVEN: BK divides the width. EARLY: folds and bias are
    read while W is, not after it. UPCAST: tiles are fp32 before they are multiplied, and x + s d is not rounded, for
    Triton's interpreter.
    Sums are fp32; each is made by one program in one order: the result has the same bits from run to run.
    """
    blocks_n = tl.cdiv(hidden, BN)
    i_first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    i_rest = tl.program_id(0) % (GROUP * blocks_n)
    size = tl.minimum(tl.cdiv(rows, BM) - i_first, GROUP)
    i_n = i_rest // size * BN
    o_m = (i_first + i_rest % size) * BM + tl.arange(0, BM)  # [BM]
    o_n = i_n + tl.arange(0, BN)  # [BN]
    o_k = tl.arange(0, BK)  # [BK]
    m_m = o_m < rows
    m_n = o_n < hidden
    b_lock, b_strength = rows_of(p_lock, p_strength, o_m, rows, rows_per_entry, num_locks)

    p_x += o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]  # [BM, BK]
    step = tl.full([], BK, tl.int64)
    if TRANSPOSED:
        p_w += o_k.to(tl.int64)[:, None] * stride_w + o_n[None, :]  # [BK, BN]
        step *= stride_w
    else:
        p_w += o_n.to(tl.int64)[None, :] * stride_w + o_k[:, None]  # [BK, BN]

    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    if EARLY:
        b_fold = tl.zeros([BM, BN], dtype=tl.float32)
        if HAS_BIAS:
            b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0)  # [BN]
    for i_k in range(0, tl.cdiv(width, BK)):
        m_k = o_k < width - i_k * BK
        b_x = tl.load(p_x, mask=m_m[:, None] if EVEN else m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_n[None, :] if EVEN else m_n[None, :] & m_k[:, None], other=0.0)
        if UPCAST:
            b_x = b_x.to(tl.float32)
            b_w = b_w.to(tl.float32)
        if SHIFT:
            b_x = shifted(b_x, p_heads, p_slots, p_values, b_lock, b_strength, num_columns, i_k * BK, o_k, D)
        elif EARLY:  # noqa: SIM102 - Triton cannot join a constant and a number
            if i_k == 0:  # the first steps' tiles are on their way: none of them waits for the rows' locks
                b_fold = folds_of(p_folds, b_lock, o_n, hidden)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
        p_x += BK
        p_w += step

    if EARLY:
        if not SHIFT:
            b_acc += b_strength[:, None] * b_fold
        if HAS_BIAS:
            b_acc += b_bias.to(tl.float32)[None, :]
        write(b_acc, p_y, o_m, o_n, rows, hidden)
    elif HALVES:
        # The folds of half the columns at a time: with all of them, the sums would not fit into the registers.
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_acc, (BM, 2, BN // 2)), (0, 2, 1)))  # [BM, BN / 2]
        i_half = i_n + BN // 2
        finish(b_left, p_bias, p_folds, p_y, b_lock, b_strength, o_m, i_n, rows, hidden, BN // 2, SHIFT, HAS_BIAS)
        finish(b_right, p_bias, p_folds, p_y, b_lock, b_strength, o_m, i_half, rows, hidden, BN // 2, SHIFT, HAS_BIAS)
    else:
        finish(b_acc, p_bias, p_folds, p_y, b_lock, b_strength, o_m, i_n, rows, hidden, BN, SHIFT, HAS_BIAS)


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def add_kernel(
    p_y: tl.tensor,
    p_folds: tl.tensor,
    p_lock: tl.tensor,
    p_strength: tl.tensor,
    rows: tl.tensor,
    rows_per_entry: tl.tensor,
    num_locks: tl.tensor,
    hidden: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Program (i, j) adds the folds to BM rows and BN columns of y, [rows, hidden] contiguous, in place, in fp32.

    Rows without a lock are neither read nor written.
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < hidden
    b_lock, b_strength = rows_of(p_lock, p_strength, o_m, rows, rows_per_entry, num_locks)
    m_row = (b_lock >= 0) | ~(b_strength >= 0)  # or a lock that does not exist: its strength is NaN
    o_y = o_m.to(tl.int64)[:, None] * hidden + o_n[None, :]  # [BM, BN]
    o_fold = b_lock.to(tl.int64)[:, None] * hidden + o_n[None, :]  # [BM, BN]
    m_y = m_row[:, None] & m_n[None, :]
    b_y = tl.load(p_y + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_y += b_strength[:, None] * tl.load(p_folds + o_fold, mask=(b_lock >= 0)[:, None] & m_n[None, :], other=0.0)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def shift_kernel(
    p_x: tl.tensor,
    p_held: tl.tensor,
    p_heads: tl.tensor,
    p_slots: tl.tensor,
    p_values: tl.tensor,
    p_lock: tl.tensor,
    p_strength: tl.tensor,
    rows: tl.tensor,
    rows_per_entry: tl.tensor,
    num_locks: tl.tensor,
    num_columns: tl.tensor,
    num_heads: tl.tensor,
    stride_x: tl.tensor,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
    PUT_BACK: tl.constexpr,
) -> None:
    """Program (i, c) adds s d to column c's head in those of BM rows of x whose lock shifts it, and keeps what it was.

    There are programs for the locked columns alone, in whatever order their heads are; one without a head shifts
    nothing. p_held: [rows, num_columns, D] of x's dtype. PUT_BACK: puts it back instead. Nothing else is read or
    written.

    BH: as many heads, or more.
    """
    i_column = tl.program_id(1)
    o_h = tl.arange(0, BH)
    b_column = tl.load(p_heads + o_h, mask=o_h < num_heads, other=-1)  # [BH]
    # As a tensor: Triton 3.9's interpreter takes no mask that is made of a tensor and a scalar.
    i_head = tl.max(tl.where(b_column == i_column, o_h, -1), axis=0, keep_dims=True)  # [1]
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    b_lock, b_strength = rows_of(p_lock, p_strength, o_m, rows, rows_per_entry, num_locks)
    b_slot = tl.load(p_slots + b_lock.to(tl.int64) * num_columns + i_column, mask=b_lock >= 0, other=-1)  # [BM]
    m_row = (b_slot >= 0) | ~(b_strength >= 0)  # or a lock that does not exist: its strength is NaN
    m_row &= i_head >= 0
    m_x = m_row[:, None] & (o_d < D)[None, :]
    o_x = o_m.to(tl.int64)[:, None] * stride_x + (i_head * D + o_d)[None, :]  # [BM, BD]
    o_held = (o_m.to(tl.int64) * num_columns + i_column)[:, None] * D + o_d[None, :]  # [BM, BD]
    if PUT_BACK:
        tl.store(p_x + o_x, tl.load(p_held + o_held, mask=m_x), mask=m_x)
    else:
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
        tl.store(p_held + o_held, b_x, mask=m_x)
        o_value = b_slot.to(tl.int64)[:, None] * D + o_d[None, :]
        b_d = tl.load(p_values + o_value, mask=(b_slot >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
        tl.store(p_x + o_x, (b_x.to(tl.float32) + b_strength[:, None] * b_d).to(p_x.dtype.element_ty), mask=m_x)


def gemm_constants(
    tile: Tile, kind: str, width: int, head_dim: int, has_bias: bool, transposed: bool
) -> dict[str, Any]:
    """The constexpr arguments of `gemm_kernel` for a tile and a kind of way, "gather" or "shift"."""
    sums = tile.rows * tile.hidden // (32 * tile.num_warps)
    return {
        "D": head_dim,
        "BM": tile.rows,
        "BN": tile.hidden,
        "BK": tile.width,
        "SHIFT": kind == "shift",
        "HAS_BIAS": has_bias,
        "TRANSPOSED": transposed,
        "EVEN": width % tile.width == 0,
        "EARLY": sums <= FEW_SUMS,
        "HALVES": sums >= MANY_SUMS,
        "UPCAST": INTERPRETED,
    }


def shift_constants(head_dim: int, num_heads: int, put_back: bool) -> dict[str, Any]:
    """The constexpr arguments of `shift_kernel`."""
    powers = {"BD": triton.next_power_of_2(head_dim), "BH": triton.next_power_of_2(num_heads)}
    return {"D": head_dim, **powers, "BM": min(SHIFT_ROWS, SHIFT_NUMBERS // powers["BD"]), "PUT_BACK": put_back}


def gemm(inputs: Inputs, tile: Tile, kind: str, y: torch.Tensor) -> None:
    """Write (x + s d) Wᵀ + c to y on the device's current stream. Does not wait for it.

    Args:
        inputs: with an x of contiguous rows.
        tile, kind: of a way: "gather" or "shift".
        y: [rows, hidden], contiguous, of x's dtype or float32.
    """
    x, weight = inputs.x, inputs.weight
    hidden, width = weight.shape
    constants = gemm_constants(tile, kind, width, inputs.head_dim, inputs.bias is not None, inputs.transposed)
    grid = (triton.cdiv(inputs.rows, tile.rows) * triton.cdiv(hidden, tile.hidden),)
    with _device_of(x):
        gemm_kernel[grid](
            x,
            weight,
            y if inputs.bias is None else inputs.bias,
            inputs.heads,
            inputs.slots,
            inputs.values,
            inputs.folds,
            inputs.lock_of_row,
            inputs.strength_of_row,
            y,
            *_counts(inputs),
            hidden,
            width,
            x.stride(0),
            weight.stride(1 if inputs.transposed else 0),
            **constants,
            **tile.options(),
        )


def add(inputs: Inputs, y: torch.Tensor) -> None:
    """Add s W d to the locked rows of y, [rows, hidden] contiguous, in place, on the device's current stream."""
    hidden = y.shape[1]
    grid = (triton.cdiv(inputs.rows, ADD_ROWS), triton.cdiv(hidden, ADD_COLUMNS))
    with _device_of(y):
        add_kernel[grid](
            y,
            inputs.folds,
            inputs.lock_of_row,
            inputs.strength_of_row,
            *_counts(inputs)[:3],
            hidden,
            BM=ADD_ROWS,
            BN=ADD_COLUMNS,
            enable_fp_fusion=True,
        )


def shift(inputs: Inputs, held: torch.Tensor) -> None:
    """Add s d to x, [rows, width] with contiguous rows, in place, on the device's current stream.

    Args:
        inputs: whose x is changed.
        held: [rows, columns of slots, head_dim] of x's dtype: gets what the shifted columns held.
    """
    _shift(inputs, held, put_back=False)


def put_back(inputs: Inputs, held: torch.Tensor) -> None:
    """Undo `shift` with what it held, bit for bit."""
    _shift(inputs, held, put_back=True)


def _shift(inputs: Inputs, held: torch.Tensor, put_back: bool) -> None:
    num_heads, num_columns = inputs.heads.shape[0], inputs.slots.shape[1]
    constants = shift_constants(inputs.head_dim, num_heads, put_back)
    grid = (triton.cdiv(inputs.rows, constants["BM"]), num_columns)
    with _device_of(held):
        shift_kernel[grid](
            inputs.x,
            held,
            inputs.heads,
            inputs.slots,
            inputs.values,
            inputs.lock_of_row,
            inputs.strength_of_row,
            *_counts(inputs),
            num_heads,
            inputs.x.stride(0),
            **constants,
            enable_fp_fusion=True,
        )


def _counts(inputs: Inputs) -> tuple[int, int, int, int]:
    """The first four of CHANGING."""
    return inputs.rows, inputs.rows_per_entry, *inputs.slots.shape


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
