"""The fold of adapters as Triton source, and its launch by Triton's JIT: where no cubin fits, and interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastlock.kernels.adapter_fold import variants
from fastlock.kernels.fold.triton_kernel import DTYPES, pointer_to

# One row of the site table, [SITE_FIELDS] int64, as `launch.build_table` fills it: 128 bytes, at a multiple of 128.
A = tl.constexpr(0)  # address of A, [rank, width]
A_ROW = tl.constexpr(1)  # elements from one row of A to the next
A_COLUMN = tl.constexpr(2)  # from one column to the next; 1 where aligned
B = tl.constexpr(3)  # address of B, [hidden, rank]
B_ROW = tl.constexpr(4)
B_COLUMN = tl.constexpr(5)
RANK = tl.constexpr(6)
HIDDEN = tl.constexpr(7)
HEAD_DIM = tl.constexpr(8)
# The layer's heads begin here in the head table; the values of head i are numbers [i * head_dim, (i + 1) * head_dim).
FIRST = tl.constexpr(9)
COUNT = tl.constexpr(10)  # how many they are
SCALE = tl.constexpr(11)  # s: float32, in the lower 32 bits
BETA = tl.constexpr(12)  # address of β, or 0
SHARED = tl.constexpr(13)  # address of what the layer's adapters share, float32
OUT = tl.constexpr(14)  # address of the result
SITE = tl.constexpr(15)  # which of the caller's sites it is, for its flag
SITE_FIELDS = tl.constexpr(variants.SITE_FIELDS)


@triton.jit  # type: ignore[untyped-decorator]
def adapter_fold_kernel(
    p_sites: tl.tensor,
    p_heads: tl.tensor,
    p_values: tl.tensor,
    p_flags: tl.tensor,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Program (i, j, k) writes rows [i * BR, (i + 1) * BR) of a site: out = shared + s * (B (A d) + beta).

    The site is number k * (programs in y) + j of the table: y alone would end at 65535 sites.

    p_sites: [sites, SITE_FIELDS] int64. p_heads: [K] int64, each locked head's first column, of every layer once.
    p_values: [K * head_dim] fp32. p_flags: [1 + sites] int32, in the host's memory and the caller's order: 1 is written
    to the first, and to that of the site, where a result is NaN or infinite. VECTOR: how many elements make
    VECTOR_BYTES bytes.
    Each program computes A d itself, BK ranks at a time: the columns of A are read from memory once, and by the other
    programs of the site from the L2. It sums in one order: the result has the same bits from run to run.
    """
    i_site = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    p_site = p_sites + i_site.to(tl.int64) * SITE_FIELDS
    p_a = pointer_to(tl.load(p_site + A), DTYPE, ALIGNED)
    a_row = tl.load(p_site + A_ROW)
    a_column = tl.load(p_site + A_COLUMN)
    p_b = pointer_to(tl.load(p_site + B), DTYPE, ALIGNED)
    b_row = tl.load(p_site + B_ROW)
    b_column = tl.load(p_site + B_COLUMN)
    rank = tl.load(p_site + RANK)
    hidden = tl.load(p_site + HIDDEN)
    head_dim = tl.load(p_site + HEAD_DIM)
    first = tl.load(p_site + FIRST)
    count = tl.load(p_site + COUNT)
    scale = tl.load((p_site + SCALE).to(tl.pointer_type(tl.float32)))
    beta = tl.load(p_site + BETA)
    shared = tl.load(p_site + SHARED)
    out = tl.load(p_site + OUT)
    if ALIGNED:
        a_row = tl.multiple_of(a_row, VECTOR)
        b_row = tl.multiple_of(b_row, VECTOR)
        rank = tl.multiple_of(rank, VECTOR)
        head_dim = tl.multiple_of(head_dim, VECTOR)
        a_column = 1
        b_column = 1

    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    o_k = tl.arange(0, BK)  # [BK]
    o_c = tl.arange(0, BC)  # [BC]
    m_r = o_r < hidden
    b_acc = tl.zeros([BR], dtype=tl.float32)
    for k in range(0, rank, BK):
        m_k = k + o_k < rank
        # Before A, which has to be waited for twice: that of the site's next ranks is then under way.
        b_b = tl.load(
            p_b + o_r[:, None] * b_row + (k + o_k)[None, :] * b_column, mask=m_r[:, None] & m_k[None, :], other=0.0
        )  # [BR, BK]
        b_ad = tl.zeros([BK], dtype=tl.float32)
        for i in range(first, first + count):
            start = tl.load(p_heads + i)
            if ALIGNED:
                start = tl.multiple_of(start, VECTOR)
            for c in range(0, head_dim, BC):
                m_c = c + o_c < head_dim
                b_d = tl.load(p_values + i * head_dim + c + o_c, mask=m_c, other=0.0)  # [BC]
                b_a = tl.load(
                    p_a + (k + o_k)[:, None] * a_row + (start + c + o_c)[None, :] * a_column,
                    mask=m_k[:, None] & m_c[None, :],
                    other=0.0,
                )  # [BK, BC]
                b_ad += tl.sum(b_a.to(tl.float32) * b_d[None, :], axis=1)
        b_acc += tl.sum(b_b.to(tl.float32) * b_ad[None, :], axis=1)

    m_beta = o_r < tl.where(beta != 0, hidden, 0)
    b_acc += tl.load(beta.to(tl.pointer_type(DTYPE)) + o_r, mask=m_beta, other=0.0).to(tl.float32)
    b_out = tl.load(shared.to(tl.pointer_type(tl.float32)) + o_r, mask=m_r, other=0.0) + scale * b_acc
    b_out = b_out.to(OUT_DTYPE)
    tl.store(out.to(tl.pointer_type(OUT_DTYPE)) + o_r, b_out, mask=m_r)
    # Every such row writes the same number to the same place: no rows have to be counted.
    m_flag = m_r & ~(tl.abs(b_out.to(tl.float32)) < float("inf"))
    o_flag = tl.zeros([BR], dtype=tl.int32)
    tl.store(p_flags + o_flag, 1, mask=m_flag)
    tl.store(p_flags + 1 + tl.load(p_site + SITE) + o_flag, 1, mask=m_flag)


# The kernel's arguments that are not constants. All point to multiples of 16 bytes: see `launch.build_table`.
SIGNATURE = {"p_sites": "*i64", "p_heads": "*i64", "p_values": "*fp32", "p_flags": "*i32"}


def constants(variant: variants.AdapterVariant) -> dict[str, Any]:
    """The kernel's constexpr arguments for a variant."""
    return {
        "DTYPE": DTYPES[variant.dtype],
        "OUT_DTYPE": DTYPES[variant.out_dtype],
        "BR": variant.block_rows,
        "BK": variants.RANKS,
        "BC": variants.COLUMNS,
        "VECTOR": variant.vector,
        "ALIGNED": variant.aligned,
    }


def launch(arguments: Sequence[torch.Tensor], variant: variants.AdapterVariant, grid: tuple[int, int, int]) -> None:
    """Launch on the device's current stream, compiled on the first launch of a variant.

    Args:
        arguments: the tensors of SIGNATURE, as in `launch.AdapterTable`.
        variant, grid: as in `launch.AdapterTable`.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        adapter_fold_kernel[grid](*arguments, **constants(variant), **variant.options())
