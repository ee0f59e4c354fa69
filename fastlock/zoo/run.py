"""A zoo of checkpoints, adapters and GGUF models: relocked or verified by many workers, on one machine or many."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastlock.architectures.serving_stacks import DEFAULT_STACKS, check_stacks
from fastlock.checkpoints.adapters.carriers.table import checked_carrier
from fastlock.checkpoints.adapters.relocking import checked_gap
from fastlock.checkpoints.gguf.relocking import STACKS as GGUF_STACKS
from fastlock.errors import FastlockError
from fastlock.locks.lock import Lock, check_lock, strength_for
from fastlock.storage.files import CONFIG, write_atomic
from fastlock.storage.places import Place, as_place, below, file_at
from fastlock.storage.remote import write_remote
from fastlock.zoo.bases import Bases, adapter_bases, places_of
from fastlock.zoo.find import check_names, find_sources, shared_files
from fastlock.zoo.pools import LocalPool, Pool, RayPool
from fastlock.zoo.report import report_page
from fastlock.zoo.schedule import Schedule
from fastlock.zoo.shares import share_of
from fastlock.zoo.tasks import FAILED, Job, Result, geometry, relock_one, verify_one

LOG_NAME = "fastlock-zoo"
OnResult = Callable[[Result, int], None]


@dataclass
class Summary:
    """What became of a zoo; true exactly when nothing is wrong with any checkpoint.

    Attributes:
        results: one for each checkpoint, in the order in which they were finished.
        seconds: how long it took.
        log: the JSON lines that were written, None for `verify_zoo`.
        report: the HTML page, None for `verify_zoo`.
    """

    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    log: Place | None = None
    report: Place | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many checkpoints have each status."""
        return dict(Counter(result.status for result in self.results))

    @property
    def wrong(self) -> list[Result]:
        """The results of checkpoints that are not as they should be."""
        return [result for result in self.results if not result.is_right]

    def __bool__(self) -> bool:
        return not self.wrong

    def to_dict(self) -> dict[str, Any]:
        """The summary as data that JSON can hold; of the results, those that are wrong."""
        return {
            "checkpoints": len(self.results),
            "counts": self.counts,
            "seconds": round(self.seconds, 3),
            "wrong": [result.to_dict() for result in self.wrong],
            "log": str(self.log) if self.log else None,
            "report": str(self.report) if self.report else None,
        }


def relock_zoo(
    sources: Iterable[str | os.PathLike[str]],
    lock: Lock,
    out: str | os.PathLike[str],
    strength: float | None = None,
    *,
    stacks: Sequence[str] | None = None,
    base: Bases | None = None,
    workers: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    ray: str | None = None,
    copy: bool = False,
    carrier: str | None = None,
    gap: float | None = None,
    on_result: OnResult | None = None,
) -> Summary:
    """Relock many checkpoints, adapters and GGUF models, each into a directory or file of its name below `out`.

    Each worker opens a base once for all adapters of it. An adapter whose base is not among `base` is a failure, with a
    sentence. A base that adapters need with the lock in its biases is relocked once, below `out`, as NAME-locked.

    If it was stopped, at whatever moment, the same call resumes: a checkpoint is in `out` whole or not at all. One that
    is broken, or whose worker dies, stops no other. Worker processes import the calling script, which must therefore
    call this under `if __name__ == "__main__":`.

    Args:
        sources: where they are: directories, patterns, list files, Hugging Face caches; docs/zoo.md lists
            what each stands for.
        lock: the lock of their aligned base.
        out: the directory to fill, or its URL; a log (JSON lines) and a report (HTML) are written there too (at a
            URL: when the run ends).
        strength: the paper's α; by default as for `fastlock.relock`.
        stacks: the serving stacks in which the lock must act; by default as for `relock_checkpoint`, and in a GGUF in
            llama.cpp, the only one in which it can.
        base: the base of the zoo, or several, as a list or by the names that adapters call them. Adapters are relocked
            over the one that they name, by its name or path; checkpoints and GGUF models of a geometry that none of
            them has are skipped, for which a config.json will do.
        workers: how many at once; by default one for each CPU, or all that Ray has.
        rank: which share of the zoo this call does, from 0; all ranks together do the whole zoo.
        world_size: how many shares the zoo is divided into.
        ray: the address of a Ray cluster whose workers to use: "auto", "local" or host:port.
        copy: copy the files that could be linked; see `relock_checkpoint`.
        carrier, gap: of adapters; see `relock_adapter`.
        on_result: called with each result, and the number of checkpoints in all.

    Returns:
        What became of each checkpoint.

    Raises:
        FastlockError: nothing can be started: a source stands for nothing, two have the same name, there are no
            workers, no base is at one of these places, or `out` is a checkpoint or a source itself.
    """
    check_lock(lock)
    strength, root = strength_for(lock, strength), _root(out)
    found = find_sources(sources, root)
    check_names(found)
    share = share_of(found, rank, world_size)
    job = Job(
        work=relock_one,
        lock=pickle.dumps(lock),
        strength=strength,
        stacks=check_stacks(DEFAULT_STACKS if stacks is None else stacks),
        gguf_stacks=GGUF_STACKS if stacks is None else check_stacks(stacks),
        copy=copy,
        geometries=tuple(geometry(place) for _, place in places_of(base)),
        bases=adapter_bases(base, root),
        carrier=checked_carrier(carrier),
        gap=checked_gap(gap),
    )
    name = LOG_NAME if rank is None else f"{LOG_NAME}.{rank}"
    summary = Summary(log=below(root, f"{name}.jsonl"), report=below(root, f"{name}.html"))
    # A gate is written into every checkpoint's own copy, and no checkpoint waits for another's.
    schedule = Schedule(share, [[] for _ in share] if lock.rank else shared_files(share), root)
    facts = {"lock": lock.digest, "strength": f"{strength:g}", "written to": str(root)}
    start = time.perf_counter()
    pool = _pool(job, workers, ray, len(share))
    try:
        with _recorded(summary, len(share), facts, on_result) as record:
            _run(pool, schedule, summary, start, record)
    finally:
        pool.stop()
    return summary


def verify_zoo(
    sources: Iterable[str | os.PathLike[str]],
    lock: Lock,
    *,
    base: Bases | None = None,
    workers: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    ray: str | None = None,
    on_result: OnResult | None = None,
) -> Summary:
    """Verify many checkpoints, adapters and GGUF models, as `verify` does each; the arguments are as in `relock_zoo`.

    An adapter is verified over the base that its receipt names; where that is not there, over one of `base`.

    Raises:
        FastlockError: nothing can be started: a source stands for nothing, there are no workers, or no base is at one
            of these places.
    """
    check_lock(lock)
    share = share_of(find_sources(sources), rank, world_size)
    summary = Summary()
    schedule = Schedule(share, [[] for _ in share])
    start = time.perf_counter()
    job = Job(work=verify_one, lock=pickle.dumps(lock), bases=adapter_bases(base))
    pool = _pool(job, workers, ray, len(share))
    try:
        _run(pool, schedule, summary, start, on_result)
    finally:
        pool.stop()
    return summary


def _root(out: str | os.PathLike[str]) -> Place:
    """The directory to fill."""
    place = as_place(out)
    root = place if isinstance(place, str) else place.expanduser().absolute()
    if file_at(below(root, CONFIG)) is not None:
        raise FastlockError(f"{root}: is a checkpoint itself. Give another directory for the relocked ones: --out.")
    return root


@contextlib.contextmanager
def _recorded(summary: Summary, total: int, facts: dict[str, str], on_result: OnResult | None) -> Iterator[OnResult]:
    """What is to be called with each result, which is logged; at the end, however it comes, the report is written."""
    if summary.log is None or summary.report is None:
        raise RuntimeError("a summary without a log is not recorded")
    with _log_at(summary.log) as log:

        def record(result: Result, total: int) -> None:
            log.write(json.dumps(result.to_dict()).encode() + b"\n")
            log.flush()
            if on_result is not None:
                on_result(result, total)

        try:
            yield record
        finally:
            _write(summary.report, report_page(summary.results, total, summary.seconds, facts).encode())


def _write(place: Place, data: bytes) -> None:
    if isinstance(place, str):
        write_remote(place, data)
    else:
        write_atomic(place, data)


@contextlib.contextmanager
def _log_at(place: Place) -> Iterator[IO[bytes]]:
    """A log to append to; at a URL, where nothing can be appended, all of it is written anew at the end."""
    if not isinstance(place, str):
        with _local_log(place) as log:
            yield log
        return
    before = file_at(place)
    with io.BytesIO() as log:
        log.write(b"" if before is None else before.read(0, before.size))
        try:
            yield log
        finally:
            write_remote(place, log.getvalue())


@contextlib.contextmanager
def _local_log(path: Path) -> Iterator[IO[bytes]]:
    """A log to append to; a last line that was not written to its end is ended first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab+")
        if end := log.seek(0, os.SEEK_END):
            log.seek(end - 1)
            log.write(b"" if log.read(1) == b"\n" else b"\n")
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: cannot be written ({error}). Choose another directory.") from None
    with log:
        yield log


def _pool(job: Job, workers: int | None, ray: str | None, tasks: int) -> Pool:
    if workers is not None and workers < 1:
        raise FastlockError(f"workers is {workers}; it must be an integer of at least 1.")
    if ray is not None:
        return RayPool(job, ray, workers)
    return LocalPool(job, max(1, min(workers or _cpus(), tasks)))


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(pool: Pool, schedule: Schedule, summary: Summary, start: float, on_result: OnResult | None) -> None:
    """Do all tasks; the summary is right at every moment."""
    for result in _results(pool, schedule):
        summary.results.append(result)
        summary.seconds = time.perf_counter() - start
        if on_result is not None:
            on_result(result, len(schedule.sources))


def _results(pool: Pool, schedule: Schedule) -> Iterator[Result]:
    running = 0
    while True:
        while running < pool.capacity and (task := schedule.next_task()) is not None:
            pool.submit(task)
            running += 1
        if not running:
            return
        task, done = pool.next()
        running -= 1
        if isinstance(done, str):
            done = Result(task.source, task.name, task.out, FAILED, done, kind=task.kind), None
        result, folds = done
        schedule.finished(task.index, folds)
        yield result
