"""What a worker does with one adapter of a zoo: over its base, which it opens once for all of that base's adapters."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TypeVar

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, MAX_CONFIG_BYTES
from fastlock.checkpoints.adapters.carriers.carrier import OpenedBase
from fastlock.checkpoints.adapters.relocked import adapter_receipt_in
from fastlock.checkpoints.adapters.relocked_base import open_base
from fastlock.checkpoints.adapters.relocking import AdapterSettings, relock_over
from fastlock.errors import FastlockError
from fastlock.judgement import Verification
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.locks.lock import Lock
from fastlock.storage.files import parse_object, read_all
from fastlock.storage.new_directory import check_paths, place_of_making
from fastlock.storage.places import as_path, as_place, files_in
from fastlock.verification import verify_over
from fastlock.zoo.bases import ZooBase, base_of
from fastlock.zoo.existing import why_not_this_relock

T = TypeVar("T")
# A base takes seconds to relock; whoever waits looks this often, and at most so long.
_LOOK_SECONDS, _PATIENCE_SECONDS = 0.05, 600.0


def relock_adapter_over(
    source: str, out: str, lock: Lock, strength: float, bases: tuple[ZooBase, ...], settings: AdapterSettings
) -> AdapterReceipt:
    """Relock an adapter over whichever of the bases it is of.

    Raises:
        FastlockError, and its kinds: it is of none of them; or as for `fastlock.relock_adapter`.
    """
    base = base_of(source, named_base(source), bases)
    adapter, target = check_paths(source, out, False)
    of_base = AdapterSettings(settings.stacks, settings.carrier, settings.gap, base.locked or None)

    def work() -> AdapterReceipt:
        return relock_over(_opened(base.place, lock, strength), adapter, target, of_base)

    return _beside_others(work, base.locked)


def verify_adapter_over(source: str, lock: Lock, bases: tuple[ZooBase, ...]) -> Verification:
    """Whether an adapter carries a lock: over the base that its receipt names, or else whichever of the bases it is of.

    A URL in a receipt is not followed: nobody but the user says which machines to reach.

    Raises:
        FastlockError, and its kinds: it is of none of them; or as for `fastlock.verify`.
    """
    files = files_in(as_place(source))
    receipt = adapter_receipt_in(files, source)
    if receipt is not None and os.path.isdir(receipt.base.name):
        place = receipt.base.name
    else:
        place = base_of(source, named_base(source), bases).place
    return verify_over(source, lock, _opened(place, lock, 1.0))


def why_adapter_is_not_done(out: str, lock: Lock, strength: float, settings: AdapterSettings) -> str | None:
    """What is wrong with an adapter that is at `out` already; None if it is what would be made.

    Raises:
        UnsupportedError, DamagedError: its receipt cannot be read.
    """
    receipt = adapter_receipt_in(files_in(as_place(out)), out)
    if (state := why_not_this_relock(receipt, lock, strength)) is not None or receipt is None:
        return state
    if settings.carrier is not None and receipt.carrier != settings.carrier:
        return f"with the lock in another carrier ({receipt.carrier})"
    if receipt.allowed_gap is not None and (settings.gap is None or receipt.allowed_gap > settings.gap):
        return f"over a base whose own fold may be off by {receipt.allowed_gap:g}"
    if idle := [stack for stack in settings.stacks if stack not in receipt.stacks]:
        return f"in a form that {' and '.join(idle)} may drop"
    return None


def named_base(source: str) -> str | None:
    """What an adapter calls its base, None where it does not say."""
    place = f"{source}/{ADAPTER_CONFIG}"
    files = files_in(as_place(source))
    if ADAPTER_CONFIG not in files:
        raise FastlockError(f"{place}: is not there any more. Run it again when nothing changes the zoo.")
    named = parse_object(read_all(files[ADAPTER_CONFIG], place, MAX_CONFIG_BYTES), place).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


# Of this process: the bases of a run are few, and each takes some hundred kilobytes.
@functools.lru_cache(maxsize=8)
def _opened(place: str, lock: Lock, strength: float) -> OpenedBase:
    return open_base(place, lock, strength)


def _beside_others(work: Callable[[], T], locked: str) -> T:
    """Work that may need a base that another worker is relocking at this moment: then once more, when that is there."""
    was_there = _is_path(locked)
    try:
        return work()
    except FastlockError:
        if was_there or not _appears(locked):
            raise
    return work()


def _appears(locked: str) -> bool:
    """Whether something is there now, or will be once another worker has made it."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not _is_path(locked):
        if not locked or not place_of_making(as_path(locked)).exists() or time.monotonic() > end:
            return _is_path(locked)
        time.sleep(_LOOK_SECONDS)
    return True


def _is_path(path: str) -> bool:
    return bool(path) and os.path.lexists(path)
