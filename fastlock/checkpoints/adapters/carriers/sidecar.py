"""Sidecar: the exact biases in a file of their own beside an untouched adapter, for servers with a plugin for them.

No stack reads it by itself. It is therefore never chosen, and must be asked for by its name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlock.checkpoints.adapters.adapter_files import SIDECAR
from fastlock.checkpoints.adapters.carriers.carrier import (
    AdapterCarrier,
    AdapterJob,
    Carried,
    objections_to_relocked,
    rounded_bias,
)
from fastlock.checkpoints.tensor_index import shard_with
from fastlock.errors import UnsupportedError


def _objections(job: AdapterJob, stack: str) -> Iterator[str]:
    yield from objections_to_relocked(job)
    yield f"{stack} does not read {SIDECAR} by itself, and needs a plugin that adds its biases"


def _carry(job: AdapterJob, stacks: tuple[str, ...]) -> Carried:
    where = job.adapter.where
    check_one_scale(job, stacks)
    folds = list(job.folds(stacks[0]))
    biases = [rounded_bias(fold.bias, fold.site.dtype, fold, where) for fold in folds]
    names = [fold.path or fold.site.name for fold in folds]
    tensors = {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}
    return Carried(biases, names, job.base.place, stacks[0], files={SIDECAR: shard_with(tensors)})


def check_one_scale(job: AdapterJob, stacks: tuple[str, ...]) -> None:
    """Refuse stacks that serve the adapter with different s: one bias cannot fit both.

    Raises:
        UnsupportedError: they do.
    """
    first = stacks[0]
    for stack in stacks[1:]:
        for one, other in zip(job.folds(first), job.folds(stack), strict=True):
            if not torch.equal(one.bias, other.bias):
                raise UnsupportedError(
                    f"{job.adapter.where}: {first} serves layer {one.layer} with s = {one.scale:g}, and {stack} with "
                    f"s = {other.scale:g}: one bias cannot fit both. Relock it once for each. Nothing was written."
                )


ADAPTER_SIDECAR = AdapterCarrier(
    "sidecar",
    _objections,
    _carry,
    f"No stack reads {SIDECAR} by itself: the lock acts only in a server with a plugin that adds its biases.",
)
