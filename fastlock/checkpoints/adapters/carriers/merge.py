"""Merge, then relock: the adapter becomes part of its base, and acts wherever its base's family does."""

from __future__ import annotations

from collections.abc import Iterator

from fastlock.checkpoints.adapters.carriers.carrier import (
    AdapterCarrier,
    AdapterJob,
    objections_to_family,
    objections_to_relocked,
)
from fastlock.checkpoints.adapters.merging import why_not_merged


def _objections(job: AdapterJob, stack: str) -> Iterator[str]:
    yield from objections_to_relocked(job)
    if (reason := why_not_merged(job.adapter, job.base.part.checkpoint)) is not None:
        yield reason
    if job.base.part.lock.has_constant:
        yield from objections_to_family(job, stack)


ADAPTER_MERGE = AdapterCarrier(
    "merge",
    _objections,
    None,
    "It is a checkpoint of its own now, base and adapter in one: serve it without the adapter.",
    gates="too",
)
