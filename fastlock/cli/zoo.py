"""`fastlock zoo`: many checkpoints, adapters and GGUF files at once.

Exit codes: 0 all are relocked, done already or skipped (`verify`: locked); 1 some are not; 2 wrong arguments;
3 nothing could be started, with the reason; 130 stopped by Ctrl-C: the same command resumes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fastlock.cli.commands import DONE, NOT_LOCKED, STOPPED, ArgumentsError, Command, Group, option
from fastlock.cli.options import COPY, FOR, JSON, LOCK, STRENGTH, at_least, stack_names
from fastlock.cli.output import CountingBar, print_json, say, warn
from fastlock.errors import FastlockError
from fastlock.zoo.shares import check_share

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.zoo.run import OnResult, Summary
    from fastlock.zoo.tasks import Result


def _relock(
    sources: list[str],
    lock: Path,
    out: str,
    strength: float | None,
    stacks: list[tuple[str, ...]] | None,
    bases: list[str] | None,
    copy: bool,
    carrier: str | None,
    gap: float | None,
    workers: int | None,
    ray: str | None,
    rank: int | None,
    world_size: int | None,
    as_json: bool,
) -> int:
    _check_share(rank, world_size)
    from fastlock.locks.lock import Lock
    from fastlock.zoo.run import relock_zoo

    loaded = Lock.load(lock)

    def work(on_result: OnResult) -> Summary:
        return relock_zoo(
            sources,
            loaded,
            out,
            strength,
            stacks=stack_names(stacks) if stacks else None,
            base=_bases(bases),
            workers=workers,
            rank=rank,
            world_size=world_size,
            ray=ray,
            copy=copy,
            carrier=carrier,
            gap=gap,
            on_result=on_result,
        )

    return _run("relocking", as_json, work)


def _verify(
    sources: list[str],
    lock: Path,
    bases: list[str] | None,
    workers: int | None,
    ray: str | None,
    rank: int | None,
    world_size: int | None,
    as_json: bool,
) -> int:
    _check_share(rank, world_size)
    from fastlock.locks.lock import Lock
    from fastlock.zoo.run import verify_zoo

    loaded = Lock.load(lock)

    def work(on_result: OnResult) -> Summary:
        return verify_zoo(
            sources,
            loaded,
            base=_bases(bases),
            workers=workers,
            rank=rank,
            world_size=world_size,
            ray=ray,
            on_result=on_result,
        )

    return _run("verifying", as_json, work)


def _bases(values: list[str] | None) -> str | Sequence[str] | Mapping[str, str] | None:
    """The bases as `relock_zoo` takes them: by names, if they were given by these."""
    values = values or []
    pairs = [value.partition("=") if "=" in value and not os.path.exists(value) else (value,) for value in values]
    named = {pair[0]: pair[2] for pair in pairs if len(pair) == 3}
    if not named:
        return values[0] if len(values) == 1 else values or None
    if len(named) < len(values) or not all(map(all, named.items())):
        raise ArgumentsError("give every --base as a directory, or every one as NAME=DIR, each name once.")
    return named


def _check_share(rank: int | None, world_size: int | None) -> None:
    try:
        check_share(rank, world_size)
    except FastlockError as error:
        raise ArgumentsError(str(error)) from None


def _run(what: str, as_json: bool, work: Callable[[OnResult], Summary]) -> int:
    """Do the work under a progress bar and print what became of it; after Ctrl-C, how to resume."""
    bar = CountingBar(what, as_json)

    def show(result: Result, total: int) -> None:
        bar.count(total, not result.is_right, (result.bytes_read or 0) + (result.bytes_written or 0))

    try:
        with bar:
            summary = work(show)
    except KeyboardInterrupt:
        warn(f"stopped after {bar.done} checkpoints; run the same command again to resume")
        return STOPPED
    if as_json:
        print_json(summary.to_dict())
    else:
        _print(summary)
    return DONE if summary else NOT_LOCKED


def _print(summary: Summary) -> None:
    for result in sorted(summary.wrong, key=lambda result: result.name):
        say(f"{result.name}: {result.status}: {result.error}", "red")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.counts.items()))
    say(f"{counts} ({summary.seconds:.1f} s)", "" if summary else "red")
    if summary.report is not None:
        say(f"report: {summary.report}")


_SOURCES = option(
    "sources",
    nargs="+",
    metavar="SOURCE",
    help="A checkpoint, an adapter or a GGUF file, a directory to search, a quoted pattern, a Hugging Face cache, a "
    "URL, or a .txt list of them.",
)
_WORKERS = option("--workers", type=at_least(1), metavar="N", help="How many at once. Default: one for each CPU.")
_RAY = option("--ray", metavar="ADDRESS", help="A Ray cluster to use: auto, local or host:port.")
_RANK = option("--rank", type=at_least(0), metavar="N", help="Which share of the zoo to do, counted from 0.")
_WORLD_SIZE = option("--world-size", type=at_least(1), metavar="N", help="How many shares the zoo is divided into.")

_VERIFIED_OVER = option(
    "--base",
    dest="bases",
    metavar="DIR",
    action="append",
    help="The base of adapters, where the one that their receipts name is not there. May be repeated, as NAME=DIR too.",
)

RELOCK = Command(
    "relock",
    "Relock many checkpoints, adapters and GGUF files into one directory. If stopped, the same command resumes.",
    (
        _SOURCES,
        LOCK,
        option(
            "--out",
            metavar="DIR",
            required=True,
            help="The directory or URL to fill, each checkpoint under its own name.",
        ),
        STRENGTH,
        FOR,
        option(
            "--base",
            dest="bases",
            metavar="DIR",
            action="append",
            help="The base of the zoo: adapters of it are relocked over it, and other models of another geometry are "
            "skipped (for these, its config.json will do). May be repeated. NAME=DIR if adapters name it differently.",
        ),
        COPY,
        option("--carrier", metavar="NAME", help="How adapters get their lock; see fastlock relock."),
        option("--gap", type=float, metavar="G", help="How far a relocked base may be off; see fastlock relock."),
        _WORKERS,
        _RAY,
        _RANK,
        _WORLD_SIZE,
        JSON,
    ),
    _relock,
)
VERIFY = Command(
    "verify",
    "Check that the lock is in place in many checkpoints, adapters and GGUF files, and print where it is not.",
    (_SOURCES, LOCK, _VERIFIED_OVER, _WORKERS, _RAY, _RANK, _WORLD_SIZE, JSON),
    _verify,
)
COMMAND = Group("zoo", "Relock or verify many checkpoints, adapters and GGUF files at once.", (RELOCK, VERIFY))
