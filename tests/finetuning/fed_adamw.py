"""Parameters of many sizes, and gradients for ProximalAdamW and for the AdamW that it is held to."""

import torch
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = [(0,), (1,), (63,), (1000,), (7186,), (3, 5, 7)]


def parameters(dtype=torch.float32, sizes=SIZES):
    made = [nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    # A view into another tensor, at an odd address; and one whose columns are contiguous, not its rows.
    made += [nn.Parameter(torch.randn(66)[3:].to(dtype)), nn.Parameter(torch.randn(8, 6).to(dtype).t())]
    return made


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def fed(theirs, ours, anchor=None, pull=0.0, scale=1.0):
    """The same random gradients for both; to theirs, the term is added by hand."""
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        g = torch.randn(p.shape).to(p.dtype)
        p.grad = g * scale
        q.grad = g.clone() if anchor is None else g + pull * (q.detach() - anchor[i])


def same(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def contents(optimizer):
    """All tensors of a state, by parameter and name."""
    return {(i, k): v.clone() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )
