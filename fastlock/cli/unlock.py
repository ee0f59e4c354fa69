"""`fastlock unlock`: a relocked checkpoint as it was before."""

from __future__ import annotations

from fastlock.cli.commands import Command
from fastlock.cli.options import CHECKPOINT, IN_PLACE, JSON, OUT, YES, check_gguf_options, target
from fastlock.cli.output import print_json, say, spinner


def _unlock(checkpoint: str, out: str | None, in_place: bool, yes: bool, as_json: bool) -> None:
    destination = target(checkpoint, out, in_place, yes)
    from fastlock.checkpoints.gguf import is_gguf, unlock_gguf
    from fastlock.checkpoints.unlocking import unlock_checkpoint

    with spinner(f"unlocking {checkpoint}", as_json):
        if is_gguf(checkpoint):
            check_gguf_options(checkpoint, in_place)
            unlock_gguf(checkpoint, destination)
        else:
            unlock_checkpoint(checkpoint, destination, in_place=in_place)
    if as_json:
        print_json({"out": destination})
    else:
        say(f"{destination}: unlocked")


COMMAND = Command(
    "unlock",
    "Write a relocked checkpoint as it was before, every file byte for byte, into a new directory.",
    (CHECKPOINT, OUT, IN_PLACE, YES, JSON),
    _unlock,
)
