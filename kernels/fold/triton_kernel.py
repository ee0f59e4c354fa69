"""The fold as Triton source, and its launch by Triton's JIT: where no cubin fits, and in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastlock.kernels.fold import variants

# True where TRITON_INTERPRET=1 was set when this module was imported: the kernel then runs on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# One row of the site table, [SITE_FIELDS] int64, as `launch.build_table` fills it: 64 bytes, at a multiple of 64.
STRIDE = tl.constexpr(0)  # elements from one row of the weight to the next; one column, if transposed
HIDDEN = tl.constexpr(1)
HEAD = tl.constexpr(2)  # the address of the site's first head, also in the head table; 0 without one
NEXT_HEAD = tl.constexpr(3)  # that of its second; 0 without one
FIRST = tl.constexpr(4)  # the site's heads begin here in the head table
# How many they are, in the lower 32 bits; in the upper ones, which of the caller's sites it is, for its flag.
COUNT_AND_SITE = tl.constexpr(variants.COUNT_AND_SITE)
BIAS = tl.constexpr(6)  # address of the existing bias, or 0
OUT = tl.constexpr(7)  # address of the result
SITE_FIELDS = tl.constexpr(variants.SITE_FIELDS)

VECTOR_BYTES = tl.constexpr(variants.VECTOR_BYTES)


@triton.jit  # type: ignore[untyped-decorator]
def pointer_to(address: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """A pointer to what an int64 is the address of."""
    p_w = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # On the pointer, not on the integer before the cast: only then are the loads 16 bytes wide.
        p_w = tl.multiple_of(p_w, VECTOR_BYTES)
    return p_w


@triton.jit  # type: ignore[untyped-decorator]
def products(b_w: tl.tensor, b_d: tl.tensor, LANES: tl.constexpr, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """W times d, of LANES columns summed up: those that one thread holds, so that nothing is exchanged.

    b_w: [BR, BD], or [BD, BR] if transposed. b_d: [BD] fp32. The result: [BR, BD / LANES], or [BD / LANES, BR].
    """
    b_w = b_w.to(tl.float32)
    if TRANSPOSED:
        b_p = b_w * b_d[:, None]
        if LANES > 1:  # Triton gives a thread columns that are BD / LANES apart
            b_p = tl.sum(tl.reshape(b_p, [LANES, b_p.shape[0] // LANES, b_p.shape[1]]), axis=0)
    else:
        b_p = b_w * b_d[None, :]
        if LANES > 1:
            b_p = tl.sum(tl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // LANES, LANES]), axis=2)
    return b_p


@triton.jit  # type: ignore[untyped-decorator]
def fold_kernel(  # noqa: PLR0915 - a third of it is left out as it is compiled
    p_sites: tl.tensor,
    p_heads: tl.tensor,
    p_values: tl.tensor,
    p_flags: tl.tensor,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Program (i, j, k) writes rows [i * BR, (i + 1) * BR) of a site: out = sum over its heads of W d, plus the bias.

    The site is number k * (programs in y) + j of the table: y alone would end at 65535 sites.

    p_sites: [sites, SITE_FIELDS] int64. p_heads: [K] int64, the address of each locked head's first column.
    p_values: [K, D] fp32. p_flags: [1 + sites] int32, in the host's memory and the caller's order: 1 is written to the
    first, and to that of the site, where a result is NaN or infinite. VECTOR: how many elements of the weight make
    VECTOR_BYTES bytes. HEADS: how many a step reads. STAGES: above 1, W comes by way of shared memory, STAGES - 1 heads
    ahead.
    One program sums a whole row in one order: the result has the same bits from run to run.

    Before the first load of W there is one row of the table to wait for, and nothing else: its fields are independent,
    the first addresses are among them, and rows beyond the site are masked. (An early return would make the compiler
    load after it what is not needed before.)
    """
    i_site = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    p_site = p_sites + i_site.to(tl.int64) * SITE_FIELDS
    stride = tl.load(p_site + STRIDE)
    hidden = tl.load(p_site + HIDDEN)
    head = tl.load(p_site + HEAD)
    first = tl.load(p_site + FIRST)
    p_count = (p_site + COUNT_AND_SITE).to(tl.pointer_type(tl.int32))
    count = tl.load(p_count)
    bias = tl.load(p_site + BIAS)
    out = tl.load(p_site + OUT)
    if ALIGNED:
        stride = tl.multiple_of(stride, VECTOR)
        if TRANSPOSED:
            hidden = tl.multiple_of(hidden, VECTOR)

    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BD)  # [BD]
    m_r = o_r < hidden
    m_d = o_d < D
    if TRANSPOSED:
        o_w = o_d[:, None] * stride + o_r[None, :]  # [BD, BR]
        m_w = m_d[:, None] & m_r[None, :]
        b_acc = tl.zeros([BD // LANES, BR], dtype=tl.float32)
    else:
        o_w = o_r[:, None] * stride + o_d[None, :]  # [BR, BD]
        m_w = m_r[:, None] & m_d[None, :]
        b_acc = tl.zeros([BR, BD // LANES], dtype=tl.float32)

    p_heads += first
    p_values += first * D
    next_head = tl.load(p_site + NEXT_HEAD)
    if HEADS == 2:
        # All loads of W before the first product: both heads' are under way at once.
        for i in range(0, count, 2):
            # As a tensor: Triton 3.9's interpreter takes no mask that is made of a tensor and a scalar.
            both = tl.full([1], i + 1, dtype=tl.int32) < count  # [1]
            p_w = tl.load(p_heads + i, mask=i > 0, other=head)
            p_next = tl.load(p_heads + i + 1, mask=(i > 0) & (i + 1 < count), other=next_head)
            b_w = tl.load(pointer_to(p_w, DTYPE, ALIGNED) + o_w, mask=m_w, other=0.0)
            b_next = tl.load(pointer_to(p_next, DTYPE, ALIGNED) + o_w, mask=m_w & both[None, :], other=0.0)
            b_d = tl.load(p_values + i * D + o_d, mask=m_d, other=0.0)  # [BD]
            b_acc += products(b_w, b_d, LANES, TRANSPOSED)
            b_d = tl.load(p_values + (i + 1) * D + o_d, mask=m_d & both, other=0.0)
            b_acc += products(b_next, b_d, LANES, TRANSPOSED)
    else:
        for i in tl.range(0, count, num_stages=STAGES):
            if not ALIGNED:  # which leaves no registers for an address ahead
                head = tl.load(p_heads + i)
            b_w = tl.load(pointer_to(head, DTYPE, ALIGNED) + o_w, mask=m_w, other=0.0)
            # Here, not where it is needed: the next head's W does not wait for its address.
            if ALIGNED:
                head = tl.load(p_heads + i + 1, mask=(i > 0) & (i + 1 < count), other=next_head)
            b_d = tl.load(p_values + i * D + o_d, mask=m_d, other=0.0)  # [BD]
            b_acc += products(b_w, b_d, LANES, TRANSPOSED)

    b_out = tl.sum(b_acc, axis=0 if TRANSPOSED else 1)  # [BR]
    m_bias = o_r < tl.where(bias != 0, hidden, 0)
    b_out += tl.load(bias.to(tl.pointer_type(DTYPE)) + o_r, mask=m_bias, other=0.0).to(tl.float32)
    b_out = b_out.to(OUT_DTYPE)
    tl.store(out.to(tl.pointer_type(OUT_DTYPE)) + o_r, b_out, mask=m_r)
    # Every such row writes the same number to the same place: no rows have to be counted.
    m_flag = m_r & ~(tl.abs(b_out.to(tl.float32)) < float("inf"))
    o_flag = tl.zeros([BR], dtype=tl.int32)
    tl.store(p_flags + o_flag, 1, mask=m_flag)
    tl.store(p_flags + 1 + tl.load(p_count + 1) + o_flag, 1, mask=m_flag)


# The kernel's arguments that are not constants. All point to multiples of 16 bytes: see `launch.build_table`.
SIGNATURE = {"p_sites": "*i64", "p_heads": "*i64", "p_values": "*fp32", "p_flags": "*i32"}


def constants(variant: variants.Variant) -> dict[str, Any]:
    """The kernel's constexpr arguments for a variant."""
    return {
        "DTYPE": DTYPES[variant.dtype],
        "OUT_DTYPE": DTYPES[variant.out_dtype],
        "D": variant.head_dim,
        "BD": variant.block_columns,
        "BR": variant.block_rows,
        "VECTOR": variant.vector,
        "LANES": variant.lanes,
        "HEADS": variant.heads,
        "STAGES": variant.stages,
        "TRANSPOSED": variant.transposed,
        "ALIGNED": variant.aligned,
    }


def launch(arguments: Sequence[torch.Tensor], variant: variants.Variant, grid: tuple[int, int, int]) -> None:
    """Launch on the device's current stream, compiled on the first launch of a variant.

    Args:
        arguments: the tensors of SIGNATURE, as in `launch.Table`.
        variant, grid: as in `launch.Table`.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        fold_kernel[grid](*arguments, **constants(variant), **variant.options())
