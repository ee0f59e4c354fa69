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

# One row of the site table, [SITE_FIELDS] int64, as `launch.build_table` fills it.
BIAS = tl.constexpr(0)  # address of the existing bias, or 0
OUT = tl.constexpr(1)  # address of the result
STRIDE = tl.constexpr(2)  # elements from one row of the weight to the next; one column, if transposed
HIDDEN = tl.constexpr(3)
FIRST = tl.constexpr(4)  # the site's heads are FIRST to LAST - 1 of the head table
LAST = tl.constexpr(5)
SITE_FIELDS = tl.constexpr(variants.SITE_FIELDS)

VECTOR_BYTES = tl.constexpr(variants.VECTOR_BYTES)


@triton.jit  # type: ignore[untyped-decorator]
def fold_kernel(
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
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Program (i, j) writes rows [j * BR, (j + 1) * BR) of site i: out = sum over its heads of W d, plus the bias.

    p_sites: [sites, SITE_FIELDS] int64. p_heads: [K] int64, the address of each locked head's first column.
    p_values: [K, D] fp32. p_flags: [1 + sites] int32, in the host's memory: 1 is written to the first, and to that
    of the site, where a result is NaN or infinite. VECTOR: how many elements of the weight make VECTOR_BYTES bytes.
    One program sums a whole row in one order: the result has the same bits from run to run.
    """
    p_site = p_sites + tl.program_id(0).to(tl.int64) * SITE_FIELDS
    i_row = tl.program_id(1).to(tl.int64) * BR
    hidden = tl.load(p_site + HIDDEN)
    stride = tl.load(p_site + STRIDE)
    first = tl.load(p_site + FIRST)
    last = tl.load(p_site + LAST)
    if i_row >= hidden:  # the grid is as high as the tallest site
        return
    if ALIGNED:
        stride = tl.multiple_of(stride, VECTOR)
        if TRANSPOSED:
            hidden = tl.multiple_of(hidden, VECTOR)

    o_r = i_row + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BD)  # [BD]
    m_r = o_r < hidden
    m_d = o_d < D
    if TRANSPOSED:
        o_w = o_d[:, None] * stride + o_r[None, :]  # [BD, BR]
        m_w = m_d[:, None] & m_r[None, :]
        b_acc = tl.zeros([BD, BR], dtype=tl.float32)
    else:
        o_w = o_r[:, None] * stride + o_d[None, :]  # [BR, BD]
        m_w = m_r[:, None] & m_d[None, :]
        b_acc = tl.zeros([BR, BD], dtype=tl.float32)

    for i_head in range(first, last):
        p_w = tl.load(p_heads + i_head).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            # On the pointer, not on the integer before the cast: only then are the loads 16 bytes wide.
            p_w = tl.multiple_of(p_w, VECTOR_BYTES)
        b_w = tl.load(p_w + o_w, mask=m_w, other=0.0).to(tl.float32)
        b_d = tl.load(p_values + i_head * D + o_d, mask=m_d, other=0.0)  # [BD]
        if TRANSPOSED:
            b_acc += b_w * b_d[:, None]
        else:
            b_acc += b_w * b_d[None, :]

    b_out = tl.sum(b_acc, axis=0 if TRANSPOSED else 1)  # [BR]
    bias = tl.load(p_site + BIAS)
    m_bias = o_r < tl.where(bias != 0, hidden, 0)
    b_out += tl.load(bias.to(tl.pointer_type(DTYPE)) + o_r, mask=m_bias, other=0.0).to(tl.float32)
    p_out = tl.load(p_site + OUT).to(tl.pointer_type(OUT_DTYPE))
    b_out = b_out.to(OUT_DTYPE)
    tl.store(p_out + o_r, b_out, mask=m_r)
    # Every such row writes the same number to the same place: no rows have to be counted.
    m_flag = m_r & ~(tl.abs(b_out.to(tl.float32)) < float("inf"))
    o_flag = tl.zeros([BR], dtype=tl.int32)
    tl.store(p_flags + o_flag, 1, mask=m_flag)
    tl.store(p_flags + 1 + tl.program_id(0) + o_flag, 1, mask=m_flag)


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
        "TRANSPOSED": variant.transposed,
        "ALIGNED": variant.aligned,
    }


def launch(arguments: Sequence[torch.Tensor], variant: variants.Variant, grid: tuple[int, int]) -> None:
    """Launch on the device's current stream, compiled on the first launch of a variant.

    Args:
        arguments: the tensors of SIGNATURE, as in `launch.Table`.
        variant, grid: as in `launch.Table`.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        fold_kernel[grid](*arguments, **constants(variant), **variant.options())
