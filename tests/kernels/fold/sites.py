"""One site's arguments, with what must not be read or written around them; and what must come out."""

import dataclasses
import math

import torch

from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold.reference import HeadColumns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 40


@dataclasses.dataclass
class Site:
    """One site's arguments, and a result inside a guarded buffer."""

    weight: torch.Tensor
    heads: tuple[int, ...]
    values: torch.Tensor
    bias: torch.Tensor | None
    guarded: torch.Tensor
    head_dim: int

    @property
    def columns(self):
        return HeadColumns.in_projection(self.weight, self.heads, self.head_dim)

    @property
    def out(self):
        return self.guarded[GUARD:-GUARD]


def make_site(
    hidden, head_dim, heads, dtype=torch.bfloat16, transposed=False, bias=True, num_heads=None, offset=0, pad=0, seed=0
):
    """Random numbers in the locked columns; NaN in all others, in the padding, around and inside the result."""
    generator = torch.Generator().manual_seed(seed)
    num_heads = max(heads, default=0) + 2 if num_heads is None else num_heads
    lines, length = (num_heads * head_dim, hidden) if transposed else (hidden, num_heads * head_dim)
    storage = torch.full((offset + lines * (length + pad),), math.nan, dtype=dtype, device=DEVICE)
    weight = storage[offset:].view(lines, length + pad)[:, :length]
    weight = weight.t() if transposed else weight
    for head in heads:
        columns = torch.randn(hidden, head_dim, generator=generator) / 8
        weight[:, head * head_dim : (head + 1) * head_dim] = columns.to(DEVICE, dtype)
    values = torch.randn(len(heads), head_dim, generator=generator, dtype=torch.float64)
    # Triton's interpreter cuts fp32 off to bf16 instead of rounding it, so there the result stays fp32.
    out_dtype = dtype if DEVICE == "cuda" else torch.float32
    return Site(
        weight,
        tuple(heads),
        values,
        torch.randn(hidden, generator=generator).to(DEVICE, dtype) if bias else None,
        torch.full((hidden + 2 * GUARD,), math.nan, dtype=out_dtype, device=DEVICE),
        head_dim,
    )


def arguments(sites):
    return [[getattr(site, name) for site in sites] for name in ("columns", "values", "bias", "out")]


def run(*sites, kind=None):
    """Fold, by the default kind of kernel or another one, which must be there."""
    if kind is None:
        fold.fold_sites(*arguments(sites))
        return
    table = fold.build_table(*arguments(sites), kind)
    assert table.variant.kind == kind
    fold.launch(table)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check(*sites, kind=None):
    """Fold, then hold every result between the roundings of truth - error and truth + error.

    Rounding keeps the order, so this is exact about rounding. The error is that of n fp32 additions and roundings,
    gamma_n = n u / (1 - n u) with u = 2**-24, times the sum of the terms' magnitudes.
    """
    run(*sites, kind=kind)
    for site in sites:
        truth = torch.zeros(site.weight.shape[0], dtype=torch.float64)
        magnitude = truth.clone()
        head_dim = site.values.shape[1]
        for head, d in zip(site.heads, site.values.double(), strict=True):
            columns = site.weight.detach().cpu()[:, head * head_dim : (head + 1) * head_dim].double()
            truth += columns @ d
            magnitude += columns.abs() @ d.abs()
        if site.bias is not None:
            truth += site.bias.detach().cpu().double()
            magnitude += site.bias.detach().cpu().double().abs()
        n = site.values.numel() + 3  # the terms, the bias, and the roundings of d and of a product
        error = n * 2.0**-24 / (1 - n * 2.0**-24) * magnitude
        out = site.out.cpu()
        low, high = (truth - error).to(out.dtype), (truth + error).to(out.dtype)
        assert ((low <= out) & (out <= high)).all(), (out.double() - truth).abs().max()
        assert site.guarded[:GUARD].isnan().all()
        assert site.guarded[-GUARD:].isnan().all()
