"""Base bias: the lock is in the base, relocked once for all adapters that leave W d as it is; the adapter stays.

It is exact where an adapter leaves the locked projections alone, or maps all of their output linearly, bias and all.
Elsewhere it is off by a gap, ‖f − W d‖ / ‖W d‖, which is allowed only where it was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastlock.architectures.adapter_stacks import why_refused
from fastlock.checkpoints.adapters.carriers.carrier import (
    AdapterCarrier,
    AdapterJob,
    Carried,
    objections_to_family,
    rounded_bias,
)

# The parameters with which an adapter puts a bias, or a whole projection, in place of the base's.
_REPLACES = frozenset(("bias", "base_layer.bias", "modules_to_save.bias"))


def _objections(job: AdapterJob, stack: str) -> Iterator[str]:
    if (refused := why_refused(stack, job.adapter.method, job.adapter.config)) is not None:
        yield refused
    if (saved := job.base.saved) is not None:
        if not job.base.carries_lock:
            yield "the base is relocked with another lock or strength (fastlock unlock takes that out)"
        if stack not in (saved.carrier.stacks or ()):
            yield f"the base is not relocked for {stack}"
    yield from objections_to_family(job, stack)
    if any(fold.action == "replaced" or not _REPLACES.isdisjoint(fold.parameters) for fold in job.folds()):
        yield "the adapter has output projections, or biases, of its own in place of the base's"
    if job.allowed_gap is None:
        if layers := job.touched():
            yield f"the adapter touches the locked projections of layers {listed(layers)}"
    elif (gap := largest_gap(job, stack)) > job.allowed_gap:
        yield f"the base's own fold is off by {gap:.2%}, and {job.allowed_gap:.2%} is allowed"


def largest_gap(job: AdapterJob, stack: str) -> float:
    """How far the base's own fold is from the adapter's, in the layer where that is the most."""
    return max((0.0 if fold.shares_base else fold.gap for fold in job.folds(stack)), default=math.inf)


def _carry(job: AdapterJob, stacks: tuple[str, ...]) -> Carried:
    # Of stacks that differ in s, the receipt tells the one in which the base's own fold is off the most.
    stack = max(stacks, key=lambda stack: largest_gap(job, stack))
    checkpoint, where = job.base.part.checkpoint, job.adapter.where
    biases = []
    for fold in job.folds(stack):
        original = None if fold.site.bias is None else checkpoint.read_vector(fold.site.bias).double()
        bias = fold.base_part if original is None else fold.base_part + original
        biases.append(rounded_bias(bias, fold.site.dtype, fold, where))
    names = [fold.path or fold.site.name for fold in job.folds()]
    config = job.adapter.config | {"base_model_name_or_path": str(job.base.place)}
    return Carried(biases, names, job.base.place, stack, None if config == job.adapter.config else config)


def listed(layers: list[int]) -> str:
    """The numbers of layers for a sentence: of many, the first and how many more there are."""
    more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
    return ", ".join(map(str, layers[:8])) + more


BASE_BIAS = AdapterCarrier(
    "base bias",
    _objections,
    _carry,
    "Serve it over {base}, the relocked base, which any adapter that leaves its output projections alone can share.",
)
