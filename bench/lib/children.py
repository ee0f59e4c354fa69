"""Fresh processes that a benchmark starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.lib.recording import last_lines


def run_module(name: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> str:
    """What a module of bench prints, run by this Python in a process of its own.

    Raises:
        RuntimeError: it failed; with the last lines of what it said.
    """
    return run_command([sys.executable, "-m", name, *arguments], environment)


def run_command(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """What a command prints. Raises as `run_module` does."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = last_lines(done.stdout + done.stderr)
        raise RuntimeError(f"{' '.join(command[:3])} … ended with code {done.returncode}:\n{said}")
    return done.stdout
