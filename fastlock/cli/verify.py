"""`fastlock verify`: whether a lock is in place, or a band unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import DONE, NOT_LOCKED, ArgumentsError, Command, option
from fastlock.cli.options import CHECKPOINT, JSON, path
from fastlock.cli.output import print_json, say, spinner

if TYPE_CHECKING:
    from pathlib import Path


def _verify(checkpoint: str, lock: Path | None, base: str | None, band: Path | None, as_json: bool) -> int:
    if (lock is None and band is None) or (band is not None and base is None):
        raise ArgumentsError(
            "give either --lock FILE, or --base DIR and --band FILE; of a relocked checkpoint, --lock FILE with them."
        )
    if band is not None:
        return _verify_band(checkpoint, lock, str(base), band, as_json)
    return _verify_lock(checkpoint, lock, base, as_json)


def _verify_lock(checkpoint: str, lock: Path | None, base: str | None, as_json: bool) -> int:
    from fastlock.locks.lock import Lock
    from fastlock.verification import verify

    loaded = Lock.load(str(lock))
    with spinner(f"verifying {checkpoint}", as_json):
        verification = verify(checkpoint, loaded, base=base)
    if as_json:
        print_json(verification.to_dict())
    else:
        at = f" at strength {verification.strength:g}" if verification.strength is not None else ""
        layers = f"; altered layers: {', '.join(map(str, verification.altered))}" if verification.altered else ""
        style = "green" if verification else "red"
        say(f"{checkpoint}: {verification.state}{at} ({verification.reason}{layers})", style)
    return DONE if verification else NOT_LOCKED


def _verify_band(checkpoint: str, lock: Path | None, base: str, band: Path, as_json: bool) -> int:
    from fastlock.locks.band import Band
    from fastlock.locks.lock import Lock
    from fastlock.verification import verify

    loaded = Band.load(band)
    of_lock = None if lock is None else Lock.load(lock)
    with spinner(f"verifying {checkpoint}", as_json):
        verification = verify(checkpoint, of_lock, base=base, band=loaded)
    if as_json:
        print_json(verification.to_dict())
    else:
        for difference in verification.differences:
            say(f"{difference.name} {difference.what}")
        say(f"{checkpoint}: {verification.state} ({verification.reason})", "green" if verification else "red")
    return DONE if verification else NOT_LOCKED


COMMAND = Command(
    "verify",
    "Check that the lock is in place, whole and unaltered; or that a band's bytes are the base's. Exit code 0 if so, 1 "
    "if not.",
    (
        CHECKPOINT,
        option("--lock", type=path, metavar="FILE", help="The lock: a fastlock .safetensors, or a released .safelock."),
        option(
            "--base",
            metavar="DIR",
            help="With --band: the checkpoint that the band was frozen in, or its URL. For an adapter: the base it "
            "is served over. Default: the one that the adapter names.",
        ),
        option("--band", type=path, metavar="FILE", help="The band: a file that `fastlock locate` wrote."),
        JSON,
    ),
    _verify,
)
