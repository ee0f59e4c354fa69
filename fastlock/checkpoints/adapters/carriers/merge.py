"""Merge, then relock: the adapter becomes part of its base, and acts wherever its base's family does."""

from __future__ import annotations

from collections.abc import Iterator

from fastlock.checkpoints.adapters.carriers.carrier import AdapterCarrier, AdapterJob
from fastlock.checkpoints.adapters.merging import why_not_merged
from fastlock.checkpoints.carrier import choose_carrier
from fastlock.errors import UnsupportedError


def _objection(job: AdapterJob, stack: str) -> str | None:
    return next(_objections(job, stack), None)


def _objections(job: AdapterJob, stack: str) -> Iterator[str]:
    checkpoint = job.base.part.checkpoint
    if job.base.saved is not None:
        yield "the base is relocked, and the lock would act twice (fastlock unlock takes it out)"
    if (reason := why_not_merged(job.adapter, checkpoint)) is not None:
        yield reason
    try:
        choose_carrier(checkpoint, (stack,))
    except UnsupportedError:
        yield f"{stack} has no place for a bias in a base of this family"


ADAPTER_MERGE = AdapterCarrier(
    "merge",
    _objection,
    None,
    "It is a checkpoint of its own now, base and adapter in one: serve it without the adapter.",
)
