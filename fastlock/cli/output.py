"""What commands print: sentences, tables, facts, JSON, progress bars and spinners. rich is imported only for these."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastlock.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

T = TypeVar("T")


def say(text: str, style: str = "") -> None:
    """Print a line of the result. Nothing in it is taken for markup, and what cannot be printed is escaped."""
    _print_line(_console(), text, style)


def warn(text: str) -> None:
    """Print a line about how it went, on standard error."""
    _print_line(_console(stderr=True), text, "yellow")


def complain(text: str) -> None:
    """Print why the command failed, on standard error."""
    from rich.text import Text

    _console(stderr=True).print(Text("fastlock: ", "bold red").append(text, "default"), soft_wrap=True)


def print_json(data: dict[str, Any]) -> None:
    """Print the result as JSON."""
    import json

    print(json.dumps(data, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table; a cell that is wider than its column is continued in the next line instead of being cut off."""
    _print_table(columns, rows, title=title)


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """Print a list of names and values."""
    rows = [(name, str(value)) for name, value in facts.items()]
    _print_table(("", ""), rows, title=title, show_header=False, title_justify="left")


def confirmed(question: str) -> bool:
    """Whether the user says yes to a question; no where nobody can be asked."""
    if not sys.stdin.isatty():
        return False
    print(f"{question} [y/N]: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[Iterable[T], str], Iterable[T]]]:
    """A progress bar for loops over `progress(items, description)`, on standard error."""
    from rich.progress import Progress

    with Progress(console=_console(stderr=True), disable=quiet, transient=True) as bar:
        yield lambda items, description: bar.track(items, description=description)


@contextlib.contextmanager
def spinner(what: str, quiet: bool) -> Iterator[None]:
    """A spinner while something runs, on standard error; transformers shows no bars of its own."""
    _silence_transformers()
    if quiet:
        yield
        return
    from rich.text import Text

    with _console(stderr=True).status(Text(what)):
        yield


class CountingBar:
    """Progress over things whose number is known once the first is done, with their rate and that of the bytes."""

    def __init__(self, what: str, quiet: bool) -> None:
        from rich import progress

        self.done = 0
        self._wrong = 0
        self._bytes = 0
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rates]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("[red]{task.fields[wrong]}"),
            console=_console(stderr=True),
            refresh_per_second=4,
            disable=quiet,
        )
        self._task = self._progress.add_task(what, total=None, rates="", wrong="")

    def __enter__(self) -> CountingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def count(self, total: int, wrong: bool, transferred: int) -> None:
        """Count one more.

        Args:
            total: how many there are.
            wrong: whether something is wrong with this one.
            transferred: the bytes that it read and wrote.
        """
        self.done += 1
        self._wrong += wrong
        self._bytes += transferred
        elapsed = self._progress.tasks[0].elapsed or 1e-9
        speed = self._progress.tasks[0].speed or self.done / elapsed
        self._progress.update(
            self._task,
            total=total,
            advance=1,
            rates=f"{speed:.1f}/s  {self._bytes / elapsed / 1e6:.1f} MB/s",
            wrong=f"{self._wrong} wrong" if self._wrong else "",
        )


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_line(console: Console, text: str, style: str) -> None:
    from rich.text import Text

    console.print(Text(shown(text), style), soft_wrap=True)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None, **settings: Any) -> None:
    from rich.table import Column, Table

    headers = (Column(column, overflow="fold") for column in columns)
    table = Table(*headers, title=None if title is None else _cell(title), **settings)
    for row in rows:
        table.add_row(*map(_cell, row))
    _console().print(table)


def _cell(text: str) -> Text:
    """What a table shows; what comes from a file cannot command the terminal."""
    from rich.text import Text

    return Text("\n".join(map(shown, text.split("\n"))))


def _silence_transformers() -> None:
    """Keep transformers' own progress bars off, without importing it for that."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if (logging := sys.modules.get("transformers.utils.logging")) is not None:
        logging.disable_progress_bar()
