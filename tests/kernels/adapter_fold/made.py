"""Sites of adapters with what must not be read or written around them; and what must come out."""

import dataclasses
import math

import torch

from fastlock.kernels.adapter_fold import launch as kernels
from fastlock.kernels.adapter_fold.reference import LowRankSite
from fastlock.kernels.fold.reference import HeadColumns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 24


@dataclasses.dataclass
class Made:
    """A site, and a result inside a guarded buffer."""

    site: LowRankSite
    guarded: torch.Tensor

    @property
    def out(self):
        return self.guarded[GUARD:-GUARD]


class Layer:
    """What the adapters of one layer share: heads, displacement, W d + c."""

    def __init__(self, hidden, head_dim, heads, num_heads=None, seed=0):
        generator = torch.Generator().manual_seed(1000 + seed)
        self.hidden, self.head_dim, self.heads = hidden, head_dim, tuple(heads)
        self.width = (num_heads or max(heads, default=0) + 2) * head_dim
        self.values = torch.randn(len(heads), head_dim, generator=generator, dtype=torch.float64)
        self.shared = torch.randn(hidden, generator=generator).to(DEVICE)

    def adapter(self, rank, dtype=torch.bfloat16, bias=False, transposed=False, pad=0, offset=0, scale=None, seed=0):
        """Random numbers in the locked columns of A and in B; NaN in other columns, in the padding, in the result."""
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows, columns, dtype=dtype):
            lines, length = (columns, rows) if transposed else (rows, columns)
            storage = torch.full((offset + lines * (length + pad),), math.nan, dtype=dtype, device=DEVICE)
            inside = storage[offset:].view(lines, length + pad)[:, :length]
            return inside.t() if transposed else inside

        down, up = matrix(rank, self.width), matrix(self.hidden, rank)
        starts = tuple(head * self.head_dim for head in self.heads)
        for start in starts:
            numbers = torch.randn(rank, self.head_dim, generator=generator) / 4
            down[:, start : start + self.head_dim] = numbers.to(DEVICE, dtype)
        up.copy_(torch.randn(self.hidden, rank, generator=generator) / 4)
        site = LowRankSite(
            HeadColumns(down, starts),
            self.values,
            up,
            float(torch.rand(1, generator=generator)) + 0.1 if scale is None else scale,
            self.shared,
            torch.randn(self.hidden, generator=generator).to(DEVICE, dtype) if bias else None,
        )
        # Triton's interpreter cuts fp32 off to bf16 instead of rounding it, so there the result stays fp32.
        out_dtype = dtype if DEVICE == "cuda" else torch.float32
        return Made(site, torch.full((self.hidden + 2 * GUARD,), math.nan, dtype=out_dtype, device=DEVICE))


def run(*made):
    table = kernels.build_table([one.site for one in made], [one.out for one in made])
    kernels.launch(table)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return table


def check(*made):
    """Fold, then hold every result between the roundings of truth - error and truth + error; returns the table.

    The error is that of n fp32 additions and roundings, gamma_n = n u / (1 - n u) with u = 2**-24, times the sum of the
    terms' magnitudes: the truth is whole matrices times dense vectors, in float64.
    """
    table = run(*made)
    for one in made:
        site = one.site
        d = torch.zeros(site.columns.matrix.shape[1], dtype=torch.float64)
        for start, value in zip(site.columns.starts, site.values, strict=True):
            d[start : start + len(value)] = value
        # NaN stands where nothing is to be read.
        down, up = site.columns.matrix.cpu().double().nan_to_num(nan=0.0), site.up.cpu().double()
        beta = torch.zeros(len(up), dtype=torch.float64) if site.bias is None else site.bias.cpu().double()
        shared, scale = site.shared.cpu().double(), site.scale
        truth = shared + scale * (up @ (down @ d) + beta)
        magnitude = shared.abs() + scale * (up.abs() @ (down.abs() @ d.abs()) + beta.abs())
        n = site.values.numel() + up.shape[1] + 6  # terms; roundings of d, of products, of s; beta and shared
        error = n * 2.0**-24 / (1 - n * 2.0**-24) * magnitude
        out = one.out.cpu()
        low, high = (truth - error).to(out.dtype), (truth + error).to(out.dtype)
        assert ((low <= out) & (out <= high)).all(), (out.double() - truth).abs().max()
        assert one.guarded[:GUARD].isnan().all()
        assert one.guarded[-GUARD:].isnan().all()
    return table
