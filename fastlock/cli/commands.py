"""What a command is: its name, its help, its options, and the function that is called with them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

# Exit codes. 1 is also what `doctor` ends with if the lock does not act, and `zoo` if some checkpoints are wrong.
DONE, NOT_LOCKED, WRONG_ARGUMENTS, REFUSED, BROKEN, STOPPED = 0, 1, 2, 3, 4, 130


class ArgumentsError(Exception):
    """Arguments that do not go together; the message says what to do."""


class Option(NamedTuple):
    """An option or argument of a command: what argparse's `add_argument` takes."""

    names: tuple[str, ...]
    settings: dict[str, Any]


class Command(NamedTuple):
    """A command.

    Attributes:
        name: what a user types.
        help: what it does; the first sentence is its line in the list of commands.
        options: its arguments and options.
        run: called with the value of each option, by name; it returns the exit code, None for 0.
    """

    name: str
    help: str
    options: tuple[Option, ...]
    run: Callable[..., int | None]


class Group(NamedTuple):
    """A command that has commands of its own.

    Attributes:
        name: what a user types.
        help: what they do.
        commands: the commands.
        options: options that stand before the command's name; none of them takes a value.
    """

    name: str
    help: str
    commands: tuple[Command | Group, ...]
    options: tuple[Option, ...] = ()


def option(*names: str, help: str, **settings: Any) -> Option:
    """An option, or an argument if its name has no dash; a default that is not plain from the help is added to it."""
    default = settings.get("default")
    return Option(names, {**settings, "help": help if default is None else f"{help} Default: {default}."})


def call(command: Command | Group, arguments: Sequence[str], prog: str = "") -> int:
    """Do what the arguments say, and return the exit code. Wrong ones, and `--help`, end in a SystemExit.

    Args:
        command: what is called.
        arguments: what was typed after its name.
        prog: what was typed before its name.
    """
    prog = f"{prog} {command.name}".lstrip()
    if isinstance(command, Group):
        return _call_one(command, arguments, prog)
    parser = _parser(command, prog, _usage(command))
    values = vars(parser.parse_intermixed_args(arguments))
    try:
        return command.run(**values) or DONE
    except ArgumentsError as error:
        parser.error(str(error))


def _call_one(group: Group, arguments: Sequence[str], prog: str) -> int:
    parser = _parser(group, prog, "[options] COMMAND ...")
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in group.commands:
        listed.add_parser(command.name, help=_first_sentence(command.help), add_help=False)
    before = list(takewhile(lambda argument: argument.startswith("-"), arguments))
    parser.parse_args(before)
    if len(before) == len(arguments):
        parser.print_help()
        return WRONG_ARGUMENTS
    name, rest = arguments[len(before)], arguments[len(before) + 1 :]
    commands = {command.name: command for command in group.commands}
    if name not in commands:
        parser.error(f"there is no command {name!r}; choose one of {', '.join(commands)}.")
    return call(commands[name], rest, prog)


def _parser(command: Command | Group, prog: str, usage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, f"{prog} {usage}", command.help, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    for names, settings in command.options:
        parser.add_argument(*names, **settings)
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's own, which would import shutil to learn the terminal's width: a tenth of the time of a `--help`."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        try:
            width = int(columns) if columns.isdigit() else os.get_terminal_size().columns
        except OSError:  # not a terminal
            width = 80
        super().__init__(prog, width=width - 2)


def _usage(command: Command) -> str:
    """What a command cannot do without."""
    parts = []
    for names, settings in command.options:
        shown = settings.get("metavar") or settings.get("dest", names[0].lstrip("-")).upper()
        if not names[0].startswith("-"):
            parts.append({"+": f"{shown}...", "?": f"[{shown}]"}.get(settings.get("nargs", ""), shown))
        elif settings.get("required"):
            parts.append(f"{names[0]} {shown}")
    return " ".join([*parts, "[options]"])


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".") + "."
