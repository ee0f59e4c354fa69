"""The `fastlock` command.

Exit codes: 0 done (for `verify`: locked; for `doctor`: it acts); 1 `verify` found the lock missing or altered, or
a band changed, `doctor` that it does not act, `locate` that no band stands out, `zoo` that some checkpoints are wrong;
2 wrong arguments; 3 refused or failed, with the reason on standard error; 4 a fault of fastlock's own; 130 stopped by
Ctrl-C.

Nothing that imports torch, transformers, numpy or rich is imported here or by a command's file: the functions of the
commands do that, once they know that their arguments are right.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from fastlock.cli import (
    calibrate,
    doctor,
    evaluate,
    extract,
    finetune,
    locate,
    relock,
    show,
    train,
    unlock,
    verify,
    zoo,
)
from fastlock.cli.commands import BROKEN, REFUSED, STOPPED, Group, call, option
from fastlock.cli.output import complain, warn
from fastlock.errors import FastlockError, FastlockWarning
from fastlock.version import __version__

COMMANDS = Group(
    "fastlock",
    "Bring the refusals back in every fine-tune of an aligned language model.",
    (
        show.COMMAND,
        extract.COMMAND,
        train.COMMAND,
        calibrate.COMMAND,
        evaluate.COMMAND,
        locate.COMMAND,
        finetune.COMMAND,
        relock.COMMAND,
        unlock.COMMAND,
        verify.COMMAND,
        doctor.COMMAND,
        zoo.COMMAND,
    ),
    (option("--version", action="version", version=f"fastlock {__version__}", help="Print the version."),),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, of the process's own arguments by default, and exit with its exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _exit_code(sys.argv[1:] if arguments is None else arguments)
    raise SystemExit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of fastlock's own as a sentence; any other as Python does, with its file and line."""
    if issubclass(category, FastlockWarning):
        warn(f"fastlock: warning: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _exit_code(arguments: Sequence[str]) -> int:
    try:
        return call(COMMANDS, arguments)
    except FastlockError as error:
        complain(str(error))
        return REFUSED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own flush at exit is quiet
        return 1
    except (OSError, UnicodeError) as error:
        print(f"fastlock: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED
    except Exception:
        import traceback

        traceback.print_exc()
        return BROKEN
