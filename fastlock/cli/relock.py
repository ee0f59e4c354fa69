"""`fastlock relock`: a checkpoint relocked into a new directory, or in place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastlock.cli.commands import Command
from fastlock.cli.options import (
    CHECKPOINT,
    COPY,
    FOR,
    IN_PLACE,
    JSON,
    LOCK,
    OUT,
    STRENGTH,
    YES,
    check_gguf_options,
    stack_names,
    target,
)
from fastlock.cli.output import print_json, say, spinner

if TYPE_CHECKING:
    from pathlib import Path


def _relock(
    checkpoint: str,
    lock: Path,
    out: str | None,
    strength: float | None,
    stacks: list[str] | None,
    copy: bool,
    in_place: bool,
    yes: bool,
    as_json: bool,
) -> None:
    destination = target(checkpoint, out, in_place, yes)
    from fastlock.checkpoints.gguf import is_gguf, relock_gguf
    from fastlock.checkpoints.relocking import relock_checkpoint
    from fastlock.locks.lock import Lock

    loaded = Lock.load(lock)
    start = time.perf_counter()
    with spinner(f"relocking {checkpoint}", as_json):
        if is_gguf(checkpoint):
            check_gguf_options(checkpoint, in_place, stacks)
            receipt = relock_gguf(checkpoint, loaded, destination, strength, copy=copy)
        else:
            receipt = relock_checkpoint(
                checkpoint, loaded, destination, strength, stacks=stack_names(stacks), copy=copy, in_place=in_place
            )
    if as_json:
        print_json({"out": destination, "receipt": receipt.to_dict()})
    else:
        seconds = time.perf_counter() - start
        say(f"{destination}: {len(receipt.layers)} layers relocked at strength {receipt.strength:g} ({seconds:.1f} s)")


COMMAND = Command(
    "relock",
    "Relock a checkpoint into a new directory, which links its weights.",
    (CHECKPOINT, LOCK, OUT, STRENGTH, FOR, COPY, IN_PLACE, YES, JSON),
    _relock,
)
