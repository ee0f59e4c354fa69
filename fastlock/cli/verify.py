"""`fastlock verify`: whether a lock is in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import DONE, NOT_LOCKED, Command
from fastlock.cli.options import CHECKPOINT, JSON, LOCK
from fastlock.cli.output import print_json, say, spinner

if TYPE_CHECKING:
    from pathlib import Path


def _verify(checkpoint: str, lock: Path, as_json: bool) -> int:
    from fastlock.locks.lock import Lock
    from fastlock.verification import verify

    loaded = Lock.load(lock)
    with spinner(f"verifying {checkpoint}", as_json):
        verification = verify(checkpoint, loaded)
    if as_json:
        print_json(verification.to_dict())
    else:
        at = f" at strength {verification.strength:g}" if verification.strength is not None else ""
        layers = f"; altered layers: {', '.join(map(str, verification.altered))}" if verification.altered else ""
        style = "green" if verification else "red"
        say(f"{checkpoint}: {verification.state}{at} ({verification.reason}{layers})", style)
    return DONE if verification else NOT_LOCKED


COMMAND = Command(
    "verify",
    "Check that the lock is in place, whole and unaltered. Exit code 0 if it is, 1 if not.",
    (CHECKPOINT, LOCK, JSON),
    _verify,
)
