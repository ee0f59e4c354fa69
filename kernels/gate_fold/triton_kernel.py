"""The fold of gates as Triton source, and its launch by Triton's JIT: where no cubin fits, and in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastlock.kernels.fold.triton_kernel import DTYPES, INTERPRETED, pointer_to, products
from fastlock.kernels.gate_fold import variants

# One row of the site table, [SITE_FIELDS] int64, as `launch.build_table` fills it. Strides are in elements, from one
# row to the next; from one column to the next, if transposed.
SOURCE_STRIDE = tl.constexpr(0)
TARGET_STRIDE = tl.constexpr(1)
KEPT_STRIDE = tl.constexpr(2)
HIDDEN = tl.constexpr(3)
FIRST = tl.constexpr(4)  # the site's chunks begin here in the chunk table
COUNT = tl.constexpr(5)  # how many they are
VECTORS = tl.constexpr(6)  # and their vectors here
CONSTANT = tl.constexpr(7)  # the lane of the displacement
BIAS = tl.constexpr(8)  # address of the existing bias, or 0
OUT = tl.constexpr(9)  # address of the new one, or 0
SITE = tl.constexpr(10)  # which of the caller's sites it is, for its flag
SITE_FIELDS = tl.constexpr(variants.SITE_FIELDS)

# One row of the chunk table, [CHUNK_FIELDS] int64: columns that lie side by side where they are read and written.
SOURCE = tl.constexpr(0)  # address of the first
TARGET = tl.constexpr(1)  # where it is written
KEPT = tl.constexpr(2)  # where it is kept as it was, or 0
COLUMNS = tl.constexpr(3)  # how many they are, at most BC, in units of UNIT
CHUNK_FIELDS = tl.constexpr(variants.CHUNK_FIELDS)
CHUNK_VECTORS = tl.constexpr(variants.CHUNK_VECTORS)

VECTOR_BYTES = tl.constexpr(variants.VECTOR_BYTES)


@triton.jit  # type: ignore[untyped-decorator]
def in_memory(o_r: tl.tensor, o_c: tl.tensor, stride: tl.tensor, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """Where rows and columns are from the first column on, [BR, BC]; [BC, BR] if transposed."""
    return o_c[:, None] * stride + o_r[None, :] if TRANSPOSED else o_r[:, None] * stride + o_c[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def inside(m_r: tl.tensor, m_c: tl.tensor, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """Which rows and columns there are, [BR, BC]; [BC, BR] if transposed."""
    return m_c[:, None] & m_r[None, :] if TRANSPOSED else m_r[:, None] & m_c[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x: tl.tensor, DTYPE: tl.constexpr, BY_HAND: tl.constexpr) -> tl.tensor:
    """float32 to the nearest of a dtype; BY_HAND: to bfloat16 in integers, as Triton's interpreter would cut off."""
    if BY_HAND and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + (tl.full([], 0x7FFF, tl.uint32) + ((bits >> 16) & 1))) & tl.full([], 0xFFFF0000, tl.uint32)
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, x, up.to(tl.float32, bitcast=True))
    return x.to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def gate_fold_kernel(  # noqa: PLR0915 - the table, and each block twice
    p_sites: tl.tensor,
    p_chunks: tl.tensor,
    p_vectors: tl.tensor,
    p_flags: tl.tensor,
    DTYPE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SUMMED: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_HAND: tl.constexpr,
) -> None:
    """Program (i, j, k) rewrites rows [i * BR, (i + 1) * BR) of a site: C + (C U) V^T over its chunks of columns.

    The site is number k * (programs in y) + j of the table: y alone would end at 65535 sites. The rows are read twice:
    for C U, and to be written; the second time they come from the cache. Between the two is a barrier, and each chunk
    is written after it was read the second time: the target may be the source.

    p_sites: [sites, SITE_FIELDS] int64. p_chunks: [chunks, CHUNK_FIELDS] int64. p_vectors: [chunks, CHUNK_VECTORS,
    LANES, BC] fp32, of each chunk U, then V, both zero beyond the chunk and the rank; the lane CONSTANT has d for U and
    0 for V, and gives W d + c. p_flags: [1 + sites] int32, in the host's memory and the caller's order: 1 is written to
    the first, and to that of the site, where a result is NaN or infinite. VECTOR: how many elements make VECTOR_BYTES
    bytes, 1 if not ALIGNED. SUMMED: how many products a thread sums at once.
    One program sums a whole row in one order: the result has the same bits from run to run.
    """
    i_site = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    p_site = p_sites + i_site.to(tl.int64) * SITE_FIELDS
    source_stride = tl.load(p_site + SOURCE_STRIDE)
    hidden = tl.load(p_site + HIDDEN)
    first = tl.load(p_site + FIRST)
    count = tl.load(p_site + COUNT).to(tl.int32)
    vectors = tl.load(p_site + VECTORS)
    target_stride = tl.load(p_site + TARGET_STRIDE)
    kept_stride = tl.load(p_site + KEPT_STRIDE)
    source_stride = tl.multiple_of(source_stride, VECTOR)
    target_stride = tl.multiple_of(target_stride, VECTOR)
    kept_stride = tl.multiple_of(kept_stride, VECTOR)
    if TRANSPOSED:
        hidden = tl.multiple_of(hidden, VECTOR)
    UNIT: tl.constexpr = 1 if TRANSPOSED else VECTOR

    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    o_c = tl.arange(0, BC)  # [BC]
    m_r = o_r < hidden
    o_source = in_memory(o_r, o_c, source_stride, TRANSPOSED)
    if TRANSPOSED:
        b_zero = tl.zeros([BC // SUMMED, BR], dtype=tl.float32)
    else:
        b_zero = tl.zeros([BR, BC // SUMMED], dtype=tl.float32)
    b_sums = (b_zero,)
    for _ in tl.static_range(LANES - 1):
        b_sums = b_sums + (b_zero,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no other way

    p_chunks += first * CHUNK_FIELDS
    p_vectors += vectors * CHUNK_VECTORS * LANES * BC
    source = tl.load(p_chunks + SOURCE, mask=count > 0, other=0)
    columns = tl.load(p_chunks + COLUMNS, mask=count > 0, other=0)
    for i in tl.range(0, count, num_stages=STAGES):
        b_w = tl.load(
            pointer_to(source, DTYPE, ALIGNED) + o_source,
            mask=inside(m_r, o_c < columns * UNIT, TRANSPOSED),
            other=0.0,
        )
        # Here, not where they are needed: the next chunk's W does not wait for its address.
        source = tl.load(p_chunks + (i + 1) * CHUNK_FIELDS + SOURCE, mask=i + 1 < count, other=0)
        columns = tl.load(p_chunks + (i + 1) * CHUNK_FIELDS + COLUMNS, mask=i + 1 < count, other=0)
        b_more = ()
        for lane in tl.static_range(LANES):
            b_u = tl.load(p_vectors + (i * CHUNK_VECTORS * LANES + lane) * BC + o_c)  # [BC]
            b_sum = b_sums[lane] + products(b_w, b_u, SUMMED, TRANSPOSED)
            b_more = b_more + (b_sum,)  # type: ignore[assignment]  # noqa: RUF005
        b_sums = b_more  # type: ignore[assignment]

    b_cu = ()  # of each lane, [BR]
    for lane in tl.static_range(LANES):
        b_row = tl.sum(b_sums[lane], axis=0 if TRANSPOSED else 1)
        b_cu = b_cu + (b_row,)  # type: ignore[assignment]  # noqa: RUF005

    tl.debug_barrier()  # no thread writes where another has not read yet
    o_target = in_memory(o_r, o_c, target_stride, TRANSPOSED)
    o_kept = in_memory(o_r, o_c, kept_stride, TRANSPOSED)
    p_vectors += LANES * BC
    source = tl.load(p_chunks + SOURCE, mask=count > 0, other=0)
    columns = tl.load(p_chunks + COLUMNS, mask=count > 0, other=0)
    for i in tl.range(0, count, num_stages=STAGES):
        m_w = inside(m_r, o_c < columns * UNIT, TRANSPOSED)
        b_w = tl.load(pointer_to(source, DTYPE, ALIGNED) + o_source, mask=m_w, other=0.0)
        kept = tl.load(p_chunks + i * CHUNK_FIELDS + KEPT)
        m_kept = inside(m_r, o_c < tl.where(kept != 0, columns, 0) * UNIT, TRANSPOSED)
        source = tl.load(p_chunks + (i + 1) * CHUNK_FIELDS + SOURCE, mask=i + 1 < count, other=0)
        columns = tl.load(p_chunks + (i + 1) * CHUNK_FIELDS + COLUMNS, mask=i + 1 < count, other=0)
        b_new = b_w.to(tl.float32)
        for lane in tl.static_range(LANES):
            b_v = tl.load(p_vectors + (i * CHUNK_VECTORS * LANES + lane) * BC + o_c)  # [BC]
            if TRANSPOSED:
                b_new += b_cu[lane][None, :] * b_v[:, None]
            else:
                b_new += b_cu[lane][:, None] * b_v[None, :]
        b_new = rounded(b_new, DTYPE, BY_HAND)
        target = tl.load(p_chunks + i * CHUNK_FIELDS + TARGET)
        tl.store(pointer_to(target, DTYPE, ALIGNED) + o_target, b_new, mask=m_w)
        tl.store(pointer_to(kept, DTYPE, ALIGNED) + o_kept, b_w, mask=m_kept)
        # 0, or NaN if any of them is not finite.
        b_zero += products(b_new, tl.zeros([BC], dtype=tl.float32), SUMMED, TRANSPOSED)

    bias = tl.load(p_site + BIAS)
    out = tl.load(p_site + OUT)
    constant = tl.load(p_site + CONSTANT)
    m_bias = o_r < tl.where(bias != 0, hidden, 0)
    b_out = tl.load(bias.to(tl.pointer_type(DTYPE)) + o_r, mask=m_bias, other=0.0).to(tl.float32)
    for lane in tl.static_range(LANES):
        b_out += tl.where(lane == constant, b_cu[lane], 0.0)
    b_out = rounded(b_out, DTYPE, BY_HAND)
    m_out = o_r < tl.where(out != 0, hidden, 0)
    tl.store(out.to(tl.pointer_type(DTYPE)) + o_r, b_out, mask=m_out)

    # Every such row writes the same number to the same place: no rows have to be counted.
    b_bad = tl.sum(b_zero, axis=0 if TRANSPOSED else 1) + tl.where(m_out, b_out.to(tl.float32) * 0.0, 0.0)  # [BR]
    m_flag = m_r & ~(b_bad == 0.0)
    o_flag = tl.zeros([BR], dtype=tl.int32)
    tl.store(p_flags + o_flag, 1, mask=m_flag)
    tl.store(p_flags + 1 + tl.load(p_site + SITE) + o_flag, 1, mask=m_flag)


# The kernel's arguments that are not constants. All point to multiples of 16 bytes: see `launch.build_table`.
SIGNATURE = {"p_sites": "*i64", "p_chunks": "*i64", "p_vectors": "*fp32", "p_flags": "*i32"}


def constants(variant: variants.GateVariant) -> dict[str, Any]:
    """The kernel's constexpr arguments for a variant."""
    return {
        "DTYPE": DTYPES[variant.dtype],
        "BR": variant.block_rows,
        "BC": variant.block_columns,
        "LANES": variant.lanes,
        "VECTOR": variant.vector if variant.aligned else 1,
        "SUMMED": variant.summed,
        "STAGES": variant.stages,
        "TRANSPOSED": variant.transposed,
        "ALIGNED": variant.aligned,
        "BY_HAND": INTERPRETED,
    }


def launch(arguments: Sequence[torch.Tensor], variant: variants.GateVariant, grid: tuple[int, int, int]) -> None:
    """Launch on the device's current stream, compiled on the first launch of a variant.

    Args:
        arguments: the tensors of SIGNATURE, as in `launch.GateTable`.
        variant, grid: as in `launch.GateTable`.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        gate_fold_kernel[grid](*arguments, **constants(variant), **variant.options())
