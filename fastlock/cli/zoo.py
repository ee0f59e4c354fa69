"""`fastlock zoo`: many checkpoints at once.

Exit codes: 0 all are relocked, done already or skipped (`verify`: locked); 1 some are not; 2 wrong arguments;
3 nothing could be begun, with the reason; 130 stopped by Ctrl-C: the same command goes on where it was.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastlock.checkpoints.relocking import DEFAULT_STACKS
from fastlock.errors import shown
from fastlock.locks.lock import Lock
from fastlock.zoo.run import Summary, relock_zoo, verify_zoo
from fastlock.zoo.tasks import DONE_ALREADY, LOCKED, RELOCKED, SKIPPED, Result

SOME_WRONG = 1
STOPPED = 130

app = typer.Typer(no_args_is_help=True, help="Relock or verify many checkpoints at once.")
_out = Console()
_err = Console(stderr=True)

_Sources = Annotated[
    list[str],
    typer.Argument(
        help="Checkpoints, directories to search, quoted patterns, Hugging Face caches, URLs, .txt lists of them."
    ),
]
LockFile = Annotated[Path, typer.Option("--lock", help="The lock: a fastlock .safetensors, or a released .safelock.")]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="How hard the lock pulls (the paper's α). Default: as calibrated, or else 6."),
]
_Workers = Annotated[int | None, typer.Option("--workers", min=1, help="How many at once; default: one for each CPU.")]
_Ray = Annotated[str | None, typer.Option("--ray", help="A Ray cluster to use: auto, local or host:port.")]
_Rank = Annotated[int | None, typer.Option("--rank", min=0, help="Which share of the zoo to do, from 0 on.")]
_World = Annotated[int | None, typer.Option("--world-size", min=1, help="In how many shares the zoo is divided.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]


@app.command()
def relock(
    sources: _Sources,
    lock: LockFile,
    out: Annotated[
        str, typer.Option("--out", help="The directory or URL to fill, each checkpoint under its own name.")
    ],
    strength: Strength = None,
    stacks: Annotated[
        list[str] | None, typer.Option("--for", help="What shall load them; default: transformers,vllm.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The lock's base or its config.json: skip checkpoints unlike it.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files that could be linked.")] = False,
    workers: _Workers = None,
    ray: _Ray = None,
    rank: _Rank = None,
    world_size: _World = None,
    as_json: _Json = False,
) -> None:
    """Relock many checkpoints into one directory. Run it again after a stop: it goes on where it was."""
    _check_ranks(rank, world_size)
    chosen = [part.strip() for given in stacks or [",".join(DEFAULT_STACKS)] for part in given.split(",")]
    loaded = Lock.load(lock)
    with _Bar("relocking", as_json) as bar:
        summary = relock_zoo(
            sources,
            loaded,
            out,
            strength,
            stacks=chosen,
            base=base,
            workers=workers,
            rank=rank,
            world_size=world_size,
            ray=ray,
            copy=copy,
            on_result=bar.show,
        )
    _finish(summary, as_json)


@app.command()
def verify(
    sources: _Sources,
    lock: LockFile,
    workers: _Workers = None,
    ray: _Ray = None,
    rank: _Rank = None,
    world_size: _World = None,
    as_json: _Json = False,
) -> None:
    """Check that the lock is in place in many checkpoints, and print where it is not."""
    _check_ranks(rank, world_size)
    loaded = Lock.load(lock)
    with _Bar("verifying", as_json) as bar:
        summary = verify_zoo(
            sources, loaded, workers=workers, rank=rank, world_size=world_size, ray=ray, on_result=bar.show
        )
    _finish(summary, as_json)


def _check_ranks(rank: int | None, world_size: int | None) -> None:
    if (rank is None) != (world_size is None):
        raise typer.BadParameter("--rank and --world-size go together")
    if rank is not None and world_size is not None and rank >= world_size:
        raise typer.BadParameter(f"--rank goes from 0 up to {world_size - 1}, the world size less one")


class _Bar:
    """Live progress on standard error; on Ctrl-C it says how to go on."""

    def __init__(self, what: str, quiet: bool) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[wrong]}"),
            console=_err,
            refresh_per_second=4,
            disable=quiet,
        )
        self._task = self._progress.add_task(what, total=None, rates="", wrong="")
        self._counts: Counter[str] = Counter()
        self._bytes = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            done = sum(self._counts.values())
            _err.print(f"stopped after {done} checkpoints; run the same command again to go on", style="yellow")
            raise typer.Exit(STOPPED)

    def show(self, result: Result, total: int) -> None:
        """Count a result."""
        self._counts[result.status] += 1
        self._bytes += (result.bytes_read or 0) + (result.bytes_written or 0)
        wrong = sum(count for status, count in self._counts.items() if status not in _RIGHT)
        elapsed = self._progress.tasks[0].elapsed or 1e-9
        speed = self._progress.tasks[0].speed or sum(self._counts.values()) / elapsed
        self._progress.update(
            self._task,
            total=total,
            advance=1,
            rates=f"{speed:.1f}/s  {self._bytes / elapsed / 1e6:.1f} MB/s",
            wrong=f"{wrong} wrong" if wrong else "",
        )


_RIGHT = (RELOCKED, DONE_ALREADY, SKIPPED, LOCKED)


def _finish(summary: Summary, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary.to_dict(), indent=2, allow_nan=False))
    else:
        _print_wrong(summary)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.counts.items()))
        _say(f"{counts} ({summary.seconds:.1f} s)", "" if summary else "red")
        if summary.report is not None:
            _say(f"report: {summary.report}")
    if not summary:
        raise typer.Exit(SOME_WRONG)


def _print_wrong(summary: Summary) -> None:
    for result in sorted(summary.wrong, key=lambda result: result.name):
        _say(f"{result.name}: {result.status}: {result.error}", "red")


def _say(text: str, style: str = "") -> None:
    _out.print(Text(shown(text), style), soft_wrap=True)  # a Text: no name is taken for markup
