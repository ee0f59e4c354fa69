"""Sites of gates with what must not be read or written around them; and what must come out."""

import dataclasses
import math

import torch

from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold import launch as kernels
from fastlock.kernels.gate_fold.reference import GateSite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 8


@dataclasses.dataclass
class Made:
    """A site, C before anything is written, [hidden, heads * head_dim], and all memory that may be written to."""

    site: GateSite
    before: torch.Tensor
    around: list[torch.Tensor]

    def spans(self, starts):
        return [slice(start, start + self.site.head_dim) for start in starts]

    @property
    def written(self):
        """C' where it is now, on the CPU."""
        columns = [self.site.target.matrix[:, span] for span in self.spans(self.site.target.starts)]
        return torch.cat(columns, dim=1).cpu() if columns else self.before.cpu()


def matrix(rows, columns, dtype, transposed=False, pad=GUARD, offset=0):
    """NaN, and a view of a part of it with other strides; [rows, columns]."""
    lines, length = (columns, rows) if transposed else (rows, columns)
    storage = torch.full((offset + (lines + 2) * (length + pad),), math.nan, dtype=dtype, device=DEVICE)
    inside = storage[offset:].view(lines + 2, length + pad)[1:-1, :length]
    return storage, inside.t() if transposed else inside


def make(
    hidden,
    head_dim,
    heads,
    rank=1,
    dtype=torch.bfloat16,
    to=None,
    keep=True,
    constant=False,
    seed=0,
    scale=0.05,
    **layout,
):
    """Random numbers in the locked columns; NaN in all others, around and inside what is written.

    `to`: the heads in another matrix that is written; None: the same columns.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    storage, weight = matrix(hidden, (max(heads, default=0) + 2) * head_dim, dtype, **layout)
    for head in heads:
        weight[:, head * head_dim : (head + 1) * head_dim] = random(hidden, head_dim).to(DEVICE, dtype)
    source = HeadColumns.in_projection(weight, heads, head_dim)
    around, target = [storage], source
    if to is not None:
        storage, weight = matrix(hidden, (max(to, default=0) + 2) * head_dim, dtype, **layout)
        around, target = [storage], HeadColumns.in_projection(weight, to, head_dim)
    columns = [source.matrix[:, start : start + head_dim] for start in source.starts]
    before = torch.cat(columns, dim=1).clone() if columns else torch.empty(hidden, 0, dtype=dtype)
    readers, writers = random(rank, len(heads), head_dim), random(rank, len(heads), head_dim) * scale
    kept, more = None, {}
    if keep:
        storage, kept = matrix(hidden, len(heads) * head_dim, dtype, **layout)
        around.append(storage)
    if constant:
        out = torch.full((hidden + 2 * GUARD,), math.nan, dtype=dtype, device=DEVICE)
        more = {"values": random(len(heads), head_dim), "bias": random(hidden).to(DEVICE, dtype)}
        more["out"] = out[GUARD:-GUARD]
        around.append(out)
    return Made(GateSite(source, readers, writers, target, kept, **more), before, around)


def run(*made, shape=None):
    table = kernels.build_table([one.site for one in made], shape)
    kernels.launch(table)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return table


def check(*made, shape=None):
    """Rewrite, then hold every number between the roundings of truth - error and truth + error; returns the table.

    The truth is dense matrices in float64. The error is that of float32 in the kernel: gamma_n = n u / (1 - n u) with
    u = 2**-24 for n additions and roundings, times the sum of the terms' magnitudes.
    """
    table = run(*made, shape=shape)
    for one in made:
        site, c = one.site, one.before.cpu().double()
        v, u = site.readers.flatten(1), site.writers.flatten(1)
        truth, n = c + (c @ u.t()) @ v, v.numel() + 6
        # C itself enters into one sum of rank + 1 terms alone, and is exact.
        error = gamma(n) * ((c.abs() @ u.abs().t()) @ v.abs()) + gamma(len(v) + 1) * c.abs()
        between(one.written, truth, error)
        expected = c.numel()
        if site.kept is not None:
            assert torch.equal(site.kept.cpu(), one.before.cpu())
            expected += c.numel()
        if site.values is not None:
            d, bias = site.values.flatten(), site.bias.cpu().double()
            between(site.out.cpu(), c @ d + bias, gamma(n) * (c.abs() @ d.abs() + bias.abs()))
            expected += len(bias)
        assert sum(int((~of.isnan()).sum()) for of in one.around) == expected, "nothing beside it was written"
    return table


def gamma(n):
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def between(got, truth, error):
    low, high = (truth - error).to(got.dtype), (truth + error).to(got.dtype)
    assert ((low <= got) & (got <= high)).all(), (got.double() - truth).abs().max()
