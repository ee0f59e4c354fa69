"""Folds launched by cubins on the fake driver, and what must come out."""

import dataclasses
from functools import partial

import torch

from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import variants
from tests.helpers import fake_driver
from tests.kernels.fold.sites import arguments

BF16_ROWS = variants.default_variant(torch.bfloat16, torch.bfloat16, 64, transposed=False, aligned=True)


EVERY = list(fake_driver.BY_NAME.values())


ALIGNED = [variant for variant in EVERY if variant.aligned]


KEPT: list[object] = []


def table_of(*sites) -> fold.Table:
    KEPT.append(sites)  # a table holds addresses only
    return fold.build_table(*arguments(sites))


def is_jit(table: fold.Table) -> bool:
    return isinstance(table.run, partial) and table.run.func is fold._launch_jit


def fold16(site) -> torch.Tensor:
    """The result in the weight's own dtype: only the interpreter needs float32."""
    site = dataclasses.replace(site, guarded=site.guarded.to(site.weight.dtype))
    fold.fold_sites(*arguments([site]))
    return site.out


def exact(site) -> torch.Tensor:
    head_dim, weight = site.values.shape[1], site.weight.double()
    total = torch.zeros(weight.shape[0], dtype=torch.float64) if site.bias is None else site.bias.double()
    for head, d in zip(site.heads, site.values.float().double(), strict=True):
        total = total + weight[:, head * head_dim : (head + 1) * head_dim] @ d
    return total.to(site.weight.dtype)
