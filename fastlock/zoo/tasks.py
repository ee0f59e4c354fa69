"""What a worker does with one checkpoint, adapter or GGUF model of a zoo, and what becomes of it."""

from __future__ import annotations

import functools
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch

from fastlock.architectures.families import head_geometry
from fastlock.checkpoints.adapters.adapter_files import is_adapter
from fastlock.checkpoints.adapters.carriers.merge import ADAPTER_MERGE
from fastlock.checkpoints.adapters.relocking import AdapterSettings
from fastlock.checkpoints.config import transformers_config
from fastlock.checkpoints.diagnosis import doctor
from fastlock.checkpoints.folding import Folds
from fastlock.checkpoints.gguf import check_gguf_stacks, relock_gguf
from fastlock.checkpoints.relocked import read_receipt
from fastlock.checkpoints.relocking import relock_checkpoint
from fastlock.errors import FastlockError
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.locks.lock import Lock
from fastlock.storage.files import CONFIG, parse_object, read_all
from fastlock.storage.places import as_place, below, file_at, is_there
from fastlock.storage.traffic import TRAFFIC
from fastlock.verification import verify
from fastlock.zoo.adapters import relock_adapter_over, verify_adapter_over, why_adapter_is_not_done
from fastlock.zoo.bases import ZooBase
from fastlock.zoo.existing import in_the_way, why_not_this_relock
from fastlock.zoo.find import ADAPTER, CHECKPOINT, GGUF
from fastlock.zoo.gguf_files import why_gguf_is_not_done, why_gguf_is_skipped

RELOCKED, DONE_ALREADY, SKIPPED, FAILED = "relocked", "done already", "skipped", "failed"
LOCKED = "locked"
RIGHT = (RELOCKED, DONE_ALREADY, SKIPPED, LOCKED)


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common.

    Attributes:
        work: what to do with a task.
        lock: the lock, pickled.
        strength: the strength to relock at.
        stacks: the serving stacks in which the lock must act.
        gguf_stacks: those of GGUF models.
        copy: copy the files that could be linked.
        geometries: those that checkpoints may have; none for any.
        bases: those that adapters may be of.
        carrier, gap: of adapters; see `relock_adapter`.
    """

    work: Callable[[Job, Task], Done]
    lock: bytes
    strength: float = 0.0
    stacks: tuple[str, ...] = ()
    gguf_stacks: tuple[str, ...] = ()
    copy: bool = False
    geometries: tuple[dict[str, Any], ...] = ()
    bases: tuple[ZooBase, ...] = ()
    carrier: str | None = None
    gap: float | None = None

    @property
    def of_adapters(self) -> AdapterSettings:
        """What adapters are relocked by."""
        return AdapterSettings(self.stacks, self.carrier, self.gap)


@dataclass(frozen=True)
class Task:
    """One checkpoint, adapter or GGUF model.

    Attributes:
        index: which one of the zoo's it is.
        source: where it is.
        name: its name in the zoo.
        out: where it goes, "" if nothing is written.
        folds: the pickled folds of files that it shares with earlier ones.
        returns_folds: whether later ones wait for folds of its files.
        kind: CHECKPOINT, ADAPTER or GGUF.
    """

    index: int
    source: str
    name: str
    out: str = ""
    folds: tuple[bytes, ...] = ()
    returns_folds: bool = False
    kind: str = CHECKPOINT


@dataclass(frozen=True)
class Result:
    """What became of one checkpoint, adapter or GGUF model.

    Attributes:
        source: its directory or file.
        name: its name in the zoo.
        out: the relocked one, "" where none was asked for.
        status: "relocked", "done already", "skipped" or "failed"; of `verify_zoo` "locked", "not locked", "altered"
            or "failed".
        error: why it was skipped, failed or is not locked; "" otherwise.
        seconds: how long its worker took.
        bytes_read: what its worker read, whole projections included; None where the system does not say.
        bytes_written: what its worker wrote.
        time: when it was finished, in seconds since 1970.
        kind: "checkpoint", "adapter" or "GGUF".
        carrier: how an adapter got its lock, see `relock_adapter`; "" for any other, and where nothing was made.
        base: what such an adapter is to be served over; "" otherwise, as for one that was merged into its base.
    """

    source: str
    name: str
    out: str
    status: str
    error: str = ""
    seconds: float = 0.0
    bytes_read: int | None = None
    bytes_written: int | None = None
    time: float = field(default_factory=time.time)
    kind: str = CHECKPOINT
    carrier: str = ""
    base: str = ""

    @property
    def is_right(self) -> bool:
        """Whether there is nothing to do about it."""
        return self.status in RIGHT

    def to_dict(self) -> dict[str, Any]:
        """The result as data that JSON can hold."""
        finished = datetime.fromtimestamp(self.time, timezone.utc).isoformat(timespec="milliseconds")
        return vars(self) | {"seconds": round(self.seconds, 6), "time": finished}


# The result, and the pickled folds of the files that later checkpoints share.
Done = tuple[Result, bytes | None]


def relock_one(job: Job, task: Task) -> Done:
    """Relock one checkpoint, adapter or GGUF model of a zoo; whatever goes wrong is in the result."""
    if task.kind == ADAPTER:
        return _relock_adapter(job, task), None
    if task.kind == GGUF:
        return _measured(task, lambda: _relock_gguf(job, task)), None
    known: Folds = {}
    for pickled in task.folds:
        known |= pickle.loads(pickled)  # as this run's own workers made them
    folds = dict(known)
    result = _measured(task, lambda: _relock(job, task, folds))
    added = {projection: fold for projection, fold in folds.items() if projection not in known}
    return result, pickle.dumps(added) if task.returns_folds and result.status == RELOCKED else None


def verify_one(job: Job, task: Task) -> Done:
    """Verify one checkpoint, adapter or GGUF model of a zoo; whatever goes wrong is in the result."""

    def check() -> tuple[str, str]:
        lock = _lock(job.lock)
        of_adapter = task.kind == ADAPTER
        verification = verify_adapter_over(task.source, lock, job.bases) if of_adapter else verify(task.source, lock)
        return verification.state, "" if verification else verification.reason

    return _measured(task, check), None


def geometry(config: str | os.PathLike[str]) -> dict[str, Any]:
    """What a lock's base and its fine-tunes have in common, out of a config.json or the directory that holds it.

    Raises:
        UnsupportedError: its family is refused, or neither fastlock nor transformers knows it.
        DamagedError: it is not a JSON object, or its numbers are not sound.
        FastlockError: there is none.
    """
    raw, where = _raw_config(config)
    text = transformers_config(raw, where).get_text_config()
    heads, head_dim = head_geometry(text)
    return {
        "model_type": raw["model_type"],
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": text.hidden_size,
    }


def _raw_config(config: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    place = as_place(config)
    file = file_at(place) or file_at(below(place, CONFIG))
    if file is None:
        raise FastlockError(f"{place}: no {CONFIG} is there. Give one, or the checkpoint's directory that holds it.")
    return parse_object(read_all(file, str(place)), str(place)), str(place)


def _relock(job: Job, task: Task, folds: Folds) -> tuple[str, str]:
    if is_there(as_place(task.out)):
        return _already_there(job, task.out)
    if job.geometries and all(differences := [_differs(task.source, geometry) for geometry in job.geometries]):
        return SKIPPED, "; ".join(dict.fromkeys(differences))
    lock = _lock(job.lock)
    relock_checkpoint(task.source, lock, task.out, job.strength, stacks=job.stacks, copy=job.copy, folds=folds)
    return RELOCKED, ""


def _relock_adapter(job: Job, task: Task) -> Result:
    receipts: list[AdapterReceipt] = []

    def work() -> tuple[str, str]:
        if is_there(as_place(task.out)):
            return _adapter_already_there(job, task.out)
        lock = _lock(job.lock)
        receipts.append(relock_adapter_over(task.source, task.out, lock, job.strength, job.bases, job.of_adapters))
        return RELOCKED, ""

    result = _measured(task, work)
    for receipt in receipts:
        result = replace(
            result, carrier=receipt.carrier, base="" if receipt.carrier == ADAPTER_MERGE.name else receipt.base.name
        )
    return result


def _relock_gguf(job: Job, task: Task) -> tuple[str, str]:
    is_done = is_there(as_place(task.out))
    if not is_done and (reason := why_gguf_is_skipped(task.source, job.geometries)) is not None:
        return SKIPPED, reason
    check_gguf_stacks(job.gguf_stacks, task.source)
    lock = _lock(job.lock)
    if is_done:
        state = why_gguf_is_not_done(task.out, lock, job.strength)
        return (DONE_ALREADY, "") if state is None else (FAILED, in_the_way(task.out, state))
    relock_gguf(task.source, lock, task.out, job.strength, copy=job.copy)
    return RELOCKED, ""


def _adapter_already_there(job: Job, out: str) -> tuple[str, str]:
    if not is_adapter(out):  # it was merged into its base, and is a checkpoint now
        return _already_there(job, out)
    state = why_adapter_is_not_done(out, _lock(job.lock), job.strength, job.of_adapters)
    return (DONE_ALREADY, "") if state is None else (FAILED, in_the_way(out, state))


def _already_there(job: Job, out: str) -> tuple[str, str]:
    state = why_not_this_relock(read_receipt(out), _lock(job.lock), job.strength)
    if state is None and (idle := [finding.stack for finding in doctor(out, job.stacks) if not finding.acts]):
        state = f"in a form that {' and '.join(idle)} would drop"
    return (DONE_ALREADY, "") if state is None else (FAILED, in_the_way(out, state))


def _differs(source: str, base: dict[str, Any]) -> str:
    """How the geometry of a checkpoint differs from its base's; "" if it is the same."""
    raw, _ = _raw_config(source)
    numbers = {"model_type": raw.get("model_type")}
    if numbers["model_type"] == base["model_type"]:
        numbers = geometry(source)
    return ", ".join(f"{key} is {value}, not {base[key]}" for key, value in numbers.items() if value != base[key])


def _measured(task: Task, work: Callable[[], tuple[str, str]]) -> Result:
    prepare()
    start, before = time.perf_counter(), _transferred()
    try:
        status, error = work()
    except FastlockError as caught:
        status, error = FAILED, str(caught)
    except Exception as caught:  # one broken checkpoint must not stop the others
        status, error = FAILED, f"{task.source}: {type(caught).__name__}: {caught}"
    after = _transferred()
    moved = [b - a for a, b in zip(before, after, strict=True)] if before and after else [None, None]
    seconds = time.perf_counter() - start
    return Result(task.source, task.name, task.out, status, error, seconds, moved[0], moved[1], kind=task.kind)


def _transferred() -> tuple[int, int] | None:
    """Bytes that this process has read (mapped and fetched ones included) and written, where the system counts them."""
    try:
        with open("/proc/self/io", "rb") as file:
            counts = dict(line.split(b": ") for line in file.read().splitlines())
        read, written = TRAFFIC.totals()
        return int(counts[b"rchar"]) + read, int(counts[b"wchar"]) + written
    except (OSError, ValueError, KeyError):
        return None


@functools.cache
def prepare() -> None:
    """Make this process a good worker: one thread, and nothing on the terminal."""
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@functools.lru_cache(maxsize=1)
def _lock(data: bytes) -> Lock:
    lock: Lock = pickle.loads(data)  # as this run's own main process sent it
    return lock
