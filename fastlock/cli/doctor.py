"""`fastlock doctor`: whether a checkpoint's lock really acts, or what folds on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli import options
from fastlock.cli.commands import DONE, NOT_LOCKED, ArgumentsError, Command, option
from fastlock.cli.options import FOR, JSON, stack_names
from fastlock.cli.output import print_json, say

if TYPE_CHECKING:
    from pathlib import Path


def _doctor(
    checkpoint: str | None, stacks: list[tuple[str, ...]] | None, base: str | None, lock: Path | None, as_json: bool
) -> int:
    if checkpoint is not None:
        return _examine(checkpoint, stack_names(stacks) if stacks else None, base, lock, as_json)
    if given := [name for name, value in (("--for", stacks), ("--base", base), ("--lock", lock)) if value]:
        names, were = " and ".join(given), "was" if len(given) == 1 else "were"
        what = "a checkpoint" if given == ["--for"] else "an adapter"
        raise ArgumentsError(f"{names} {were} given without {what}. Name one, or leave {names} out.")
    _show_launch_paths(as_json)
    return DONE


def _examine(
    checkpoint: str, stacks: tuple[str, ...] | None, base: str | None, lock: Path | None, as_json: bool
) -> int:
    from fastlock.checkpoints.diagnosis import doctor
    from fastlock.locks.lock import Lock

    findings = doctor(checkpoint, stacks, base=base, lock=None if lock is None else Lock.load(lock))
    if as_json:
        print_json({"checkpoint": checkpoint, "stacks": [finding.to_dict() for finding in findings]})
    else:
        for finding in findings:
            say(f"{finding.stack}: {finding.reason}", "green" if finding.acts else "red")
    return DONE if all(finding.acts for finding in findings) else NOT_LOCKED


def _show_launch_paths(as_json: bool) -> None:
    from fastlock.kernels.launch_paths import launch_paths

    paths = launch_paths()
    if as_json:
        print_json({"devices": [path.to_dict() for path in paths]})
        return
    for path in paths:
        say(f"{path.device}: {path.path} ({path.reason})")
        for fault in path.faults:
            say(f"{path.device}: {fault}", "red")


COMMAND = Command(
    "doctor",
    "Say whether the lock of a checkpoint, an adapter or a GGUF file really acts in each stack. Exit code 0 if "
    "it acts in all of them, 1 if not. Without a checkpoint: what folds on each of this machine's devices, and why.",
    (
        option(
            "checkpoint",
            metavar="CHECKPOINT",
            nargs="?",
            help="A checkpoint's or an adapter's directory or URL; or a GGUF file, for llama.cpp unless --for is "
            "given. Default: none.",
        ),
        FOR,
        option(
            "--base",
            metavar="DIR",
            help="For an adapter: the base it is served over, or its URL. Default: the one that the adapter names.",
        ),
        option(
            "--lock",
            type=options.path,
            metavar="FILE",
            help="For an adapter: a lock, to say which carriers keep it, and how far the base's own fold is off.",
        ),
        JSON,
    ),
    _doctor,
)
