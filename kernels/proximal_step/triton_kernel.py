"""The step as Triton source, and its launch by Triton's JIT: where no cubin fits, and in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastlock.kernels.proximal_step import variants

# True where TRITON_INTERPRET=1 was set when this module was imported: the kernels then run on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# One row of scalars, [SCALAR_FIELDS] float32, as `launch.scalars_of` fills it.
ONE_MINUS_BETA1 = tl.constexpr(0)
BETA2 = tl.constexpr(1)
ONE_MINUS_BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)  # lr * weight_decay
STEP_SIZE = tl.constexpr(5)  # lr / (1 - beta1^step)
UNBIASED = tl.constexpr(6)  # 1 / sqrt(1 - beta2^step)
PULL = tl.constexpr(7)
ANCHOR_RATE = tl.constexpr(8)  # lr * anchor_decay
KEY_LOW = tl.constexpr(9)  # of the random bits: 16 bits of the key, and the 16 above them
KEY_HIGH = tl.constexpr(10)
SCALAR_FIELDS = tl.constexpr(variants.SCALAR_FIELDS)

# What may be another with every launch, [CONTROL_FIELDS] int64; the gradients' addresses follow.
FOUND_INF = tl.constexpr(0)  # address of a float32 that is not 0 if nothing is to be touched, or 0
INVERSE_SCALE = tl.constexpr(1)  # address of the float32 by which gradients are to be multiplied, or 0
CLIP = tl.constexpr(2)  # address of the float32 by which gradients with the term are to be multiplied, or 0
SUMS = tl.constexpr(3)  # address of a float32 for each program's sum of squares
CONTROL_FIELDS = tl.constexpr(variants.CONTROL_FIELDS)

# One tensor, [TENSOR_FIELDS] int64.
WEIGHT = tl.constexpr(0)  # addresses
FIRST_MOMENT = tl.constexpr(1)
SECOND_MOMENT = tl.constexpr(2)
ANCHOR = tl.constexpr(3)
LENGTH = tl.constexpr(4)  # elements
ROW = tl.constexpr(5)  # of the scalars
ORDINAL = tl.constexpr(6)  # among the optimizer's parameters, for the random bits
TENSOR_FIELDS = tl.constexpr(variants.TENSOR_FIELDS)

CHUNK_FIELDS = tl.constexpr(variants.CHUNK_FIELDS)
VECTOR_BYTES = tl.constexpr(variants.VECTOR_BYTES)


@triton.jit  # type: ignore[untyped-decorator]
def mix(x: tl.tensor) -> tl.tensor:
    """Another 32 bits for each 32 bits, one to one (the hash "lowbias32", C. Wellons, hash-prospector)."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def load_at(p: tl.tensor, o: tl.tensor, m: tl.tensor, DTYPE: tl.constexpr, FULL: tl.constexpr) -> tl.tensor:
    """A block as float32; a FULL one 16 bytes at a time, another without what is masked."""
    p = p.to(tl.pointer_type(DTYPE))
    if FULL:
        # On the pointer, not on the integer before the cast: only then are the loads 16 bytes wide.
        return tl.load(tl.multiple_of(p, VECTOR_BYTES) + o).to(tl.float32)
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def store_at(
    p: tl.tensor,
    o: tl.tensor,
    m: tl.tensor,
    x: tl.tensor,
    r: tl.tensor,
    DTYPE: tl.constexpr,
    FULL: tl.constexpr,
    BY_HAND: tl.constexpr,
) -> None:
    """Store a block of float32; where DTYPE is bfloat16 and BY_HAND, rounded up if the cut-off bits plus r carry."""
    if BY_HAND and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + r) & tl.full([], 0xFFFF0000, tl.uint32)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        x = tl.where(is_nan, x, rounded.to(tl.float32, bitcast=True))
    p = p.to(tl.pointer_type(DTYPE))
    if FULL:
        tl.store(tl.multiple_of(p, VECTOR_BYTES) + o, x.to(DTYPE))
    else:
        tl.store(p + o, x.to(DTYPE), mask=m)


@triton.jit  # type: ignore[untyped-decorator]
def to_nearest(x: tl.tensor) -> tl.tensor:
    """What to add so that `store_at` rounds to the nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.full([], 0x7FFF, tl.uint32) + ((bits >> 16) & 1)


@triton.jit  # type: ignore[untyped-decorator]
def step_block(
    p_w: tl.tensor,
    p_g: tl.tensor,
    p_m: tl.tensor,
    p_v: tl.tensor,
    p_a: tl.tensor,
    o: tl.tensor,
    mask: tl.tensor,
    p_row: tl.tensor,
    inverse_scale: tl.tensor,
    clip: tl.tensor,
    key: tl.tensor,
    WEIGHT_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISE: tl.constexpr,
    BY_HAND: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    """The step of one block of one tensor, all of it read once and written once."""
    g = load_at(p_g, o, mask, WEIGHT_DTYPE, FULL) * inverse_scale
    w = load_at(p_w, o, mask, WEIGHT_DTYPE, FULL)
    m = load_at(p_m, o, mask, STATE_DTYPE, FULL)
    v = load_at(p_v, o, mask, STATE_DTYPE, FULL)
    # What is small is added up first: one rounding in the size of w, and w - 0 is w, whatever its sign.
    change = tl.load(p_row + DECAY) * w
    if ANCHOR_DTYPE is not None:
        away = w - load_at(p_a, o, mask, ANCHOR_DTYPE, FULL)
        g += tl.load(p_row + PULL) * away
        change += tl.load(p_row + ANCHOR_RATE) * away
    g *= clip
    m += tl.load(p_row + ONE_MINUS_BETA1) * (g - m)
    v = tl.load(p_row + BETA2) * v + tl.load(p_row + ONE_MINUS_BETA2) * g * g
    if PRECISE:
        denominator = tl.sqrt_rn(v) * tl.load(p_row + UNBIASED) + tl.load(p_row + EPS)
        change += tl.load(p_row + STEP_SIZE) * tl.div_rn(m, denominator)
    else:
        denominator = tl.sqrt(v) * tl.load(p_row + UNBIASED) + tl.load(p_row + EPS)
        change += tl.load(p_row + STEP_SIZE) * (m / denominator)
    new = w - change
    if STOCHASTIC:
        # A counter, the element's number, and a key of seed, step and tensor: the same bits in every run.
        low = (o & tl.full([], 0xFFFFFFFF, tl.int64)).to(tl.uint32)
        high = (o >> 32).to(tl.uint32)
        first = mix(mix(low ^ key) + high)
        second = mix(first ^ key)
        store_at(p_w, o, mask, new, first >> 16, WEIGHT_DTYPE, FULL, True)
        store_at(p_m, o, mask, m, first & 0xFFFF, STATE_DTYPE, FULL, True)
        store_at(p_v, o, mask, v, second >> 16, STATE_DTYPE, FULL, True)
    else:
        store_at(p_w, o, mask, new, to_nearest(new), WEIGHT_DTYPE, FULL, BY_HAND)
        store_at(p_m, o, mask, m, to_nearest(m), STATE_DTYPE, FULL, BY_HAND)
        store_at(p_v, o, mask, v, to_nearest(v), STATE_DTYPE, FULL, BY_HAND)


@triton.jit  # type: ignore[untyped-decorator]
def step_kernel(
    p_scalars: tl.tensor,
    p_moving: tl.tensor,
    p_tensors: tl.tensor,
    p_chunks: tl.tensor,
    WEIGHT_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISE: tl.constexpr,
    BY_HAND: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Program i steps one block of one tensor, those of row i of the chunks.

    p_scalars: [rows, SCALAR_FIELDS] fp32. p_moving: [CONTROL_FIELDS + tensors] int64, the latter the gradients'
    addresses; 0 for a tensor without one, which is left as it is. p_tensors: [tensors, TENSOR_FIELDS] int64. p_chunks:
    [programs, CHUNK_FIELDS] int32. BY_HAND: to bfloat16, round in integers; Triton's interpreter would cut off.
    """
    p_chunk = p_chunks + tl.program_id(0).to(tl.int64) * CHUNK_FIELDS
    i_tensor = tl.load(p_chunk).to(tl.int64)
    start = tl.load(p_chunk + 1).to(tl.int64) * BLOCK
    p_found_inf = tl.load(p_moving + FOUND_INF)
    p_scale = tl.load(p_moving + INVERSE_SCALE)
    p_clip = tl.load(p_moving + CLIP)
    # These need not wait for one another: no branch before all of them is there.
    p_tensor = p_tensors + i_tensor * TENSOR_FIELDS
    p_g = tl.load(p_moving + CONTROL_FIELDS + i_tensor)
    p_w = tl.load(p_tensor + WEIGHT)
    p_m = tl.load(p_tensor + FIRST_MOMENT)
    p_v = tl.load(p_tensor + SECOND_MOMENT)
    p_a = tl.load(p_tensor + ANCHOR)
    length = tl.load(p_tensor + LENGTH)
    p_row = p_scalars + tl.load(p_tensor + ROW) * SCALAR_FIELDS
    if p_g == 0:
        return
    found_inf = 0.0
    if p_found_inf != 0:
        found_inf = tl.load(p_found_inf.to(tl.pointer_type(tl.float32)))
    if found_inf != 0.0:
        return
    inverse_scale = 1.0
    if p_scale != 0:
        inverse_scale = tl.load(p_scale.to(tl.pointer_type(tl.float32)))
    clip = 1.0
    if p_clip != 0:
        clip = tl.load(p_clip.to(tl.pointer_type(tl.float32)))
    key = tl.full([], 0, tl.uint32)
    if STOCHASTIC:
        key = tl.load(p_row + KEY_LOW).to(tl.uint32) + (tl.load(p_row + KEY_HIGH).to(tl.uint32) << 16)
        key = mix(key + tl.load(p_tensor + ORDINAL).to(tl.uint32))
    # A block that ends before the tensor does, at addresses that all allow it, is read 16 bytes at a time.
    if (start + BLOCK <= length) & (((p_w | p_g | p_m | p_v | p_a) & 15) == 0):
        o = start + tl.arange(0, BLOCK)  # [BLOCK] int64
        step_block(
            p_w,
            p_g,
            p_m,
            p_v,
            p_a,
            o,
            o < length,
            p_row,
            inverse_scale,
            clip,
            key,
            WEIGHT_DTYPE,
            STATE_DTYPE,
            ANCHOR_DTYPE,
            STOCHASTIC,
            PRECISE,
            BY_HAND,
            True,
        )
    else:
        last = tl.minimum(start + BLOCK, length)
        while start < last:
            o = start + tl.arange(0, PIECE)  # [PIECE] int64
            step_block(
                p_w,
                p_g,
                p_m,
                p_v,
                p_a,
                o,
                o < last,
                p_row,
                inverse_scale,
                clip,
                key,
                WEIGHT_DTYPE,
                STATE_DTYPE,
                ANCHOR_DTYPE,
                STOCHASTIC,
                PRECISE,
                BY_HAND,
                False,
            )
            start += PIECE


@triton.jit  # type: ignore[untyped-decorator]
def norm_block(
    p_w: tl.tensor,
    p_g: tl.tensor,
    p_a: tl.tensor,
    o: tl.tensor,
    mask: tl.tensor,
    p_row: tl.tensor,
    inverse_scale: tl.tensor,
    WEIGHT_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tensor:
    """The sum of squares of one block of one gradient, the term included."""
    g = load_at(p_g, o, mask, WEIGHT_DTYPE, FULL) * inverse_scale
    if ANCHOR_DTYPE is not None:
        w = load_at(p_w, o, mask, WEIGHT_DTYPE, FULL)
        g += tl.load(p_row + PULL) * (w - load_at(p_a, o, mask, ANCHOR_DTYPE, FULL))
    return tl.sum(g * g, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def norm_kernel(
    p_scalars: tl.tensor,
    p_moving: tl.tensor,
    p_tensors: tl.tensor,
    p_chunks: tl.tensor,
    WEIGHT_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Program i writes the sum of squares of one block of one gradient, the term included, to SUMS[i].

    The arguments are those of `step_kernel`; CLIP is not read.
    """
    p_chunk = p_chunks + tl.program_id(0).to(tl.int64) * CHUNK_FIELDS
    i_tensor = tl.load(p_chunk).to(tl.int64)
    start = tl.load(p_chunk + 1).to(tl.int64) * BLOCK
    p_sum = tl.load(p_moving + SUMS).to(tl.pointer_type(tl.float32)) + tl.program_id(0)
    p_g = tl.load(p_moving + CONTROL_FIELDS + i_tensor)
    if p_g == 0:
        tl.store(p_sum, 0.0)
        return
    inverse_scale = 1.0
    p_scale = tl.load(p_moving + INVERSE_SCALE)
    if p_scale != 0:
        inverse_scale = tl.load(p_scale.to(tl.pointer_type(tl.float32)))
    p_tensor = p_tensors + i_tensor * TENSOR_FIELDS
    p_w = tl.load(p_tensor + WEIGHT)
    p_a = tl.load(p_tensor + ANCHOR)
    length = tl.load(p_tensor + LENGTH)
    p_row = p_scalars + tl.load(p_tensor + ROW) * SCALAR_FIELDS
    total = 0.0
    if (start + BLOCK <= length) & (((p_w | p_g | p_a) & 15) == 0):
        o = start + tl.arange(0, BLOCK)  # [BLOCK] int64
        total = norm_block(p_w, p_g, p_a, o, o < length, p_row, inverse_scale, WEIGHT_DTYPE, ANCHOR_DTYPE, True)
    else:
        last = tl.minimum(start + BLOCK, length)
        while start < last:
            o = start + tl.arange(0, PIECE)  # [PIECE] int64
            total += norm_block(p_w, p_g, p_a, o, o < last, p_row, inverse_scale, WEIGHT_DTYPE, ANCHOR_DTYPE, False)
            start += PIECE
    tl.store(p_sum, total)


# The kernels' arguments that are not constants: four addresses, multiples of 16. No number is among them: numbers that
# change, such as the learning rate, are read from memory, and nothing is compiled anew for them.
SIGNATURE = {"p_scalars": "*fp32", "p_moving": "*i64", "p_tensors": "*i64", "p_chunks": "*i32"}


def kernel_of(variant: variants.StepVariant | variants.NormVariant) -> Any:
    """The jitted function of a variant."""
    return step_kernel if isinstance(variant, variants.StepVariant) else norm_kernel


def constants(variant: variants.StepVariant | variants.NormVariant) -> dict[str, Any]:
    """The kernel's constexpr arguments for a variant."""
    anchor = None if variant.anchor is None else DTYPES[variant.anchor]
    dtypes = {"WEIGHT_DTYPE": DTYPES[variant.weight], "ANCHOR_DTYPE": anchor}
    if isinstance(variant, variants.NormVariant):
        return {**dtypes, "BLOCK": variant.block, "PIECE": variants.PIECE}
    return {
        "WEIGHT_DTYPE": dtypes["WEIGHT_DTYPE"],
        "STATE_DTYPE": DTYPES[variant.state],
        "ANCHOR_DTYPE": anchor,
        "STOCHASTIC": variant.stochastic,
        "PRECISE": variant.precise,
        "BY_HAND": INTERPRETED,
        "BLOCK": variant.block,
        "PIECE": variants.PIECE,
    }


def launch(
    arguments: Sequence[torch.Tensor], variant: variants.StepVariant | variants.NormVariant, programs: int
) -> None:
    """Launch on the device's current stream, compiled on the first launch of a variant.

    Args:
        arguments: the tensors of SIGNATURE, as in `launch.Table`.
        variant: what to launch.
        programs: one for each row of the chunks.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel_of(variant)[(programs,)](*arguments, **constants(variant), **variant.options())
