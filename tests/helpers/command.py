"""The command, run in this process as its entry point runs it."""

import contextlib
import io
from typing import NamedTuple

import pytest

from fastlock.cli.main import main


class Done(NamedTuple):
    """What a command printed."""

    out: str
    err: str


def run_command(*arguments: object, code: int = 0) -> Done:
    """Run `fastlock ARGUMENTS`, which ends with this exit code."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as end,
    ):
        main([*map(str, arguments)])
    done = Done(out.getvalue(), err.getvalue())
    assert end.value.code == code, f"exit code {end.value.code}: {done}"
    return done
