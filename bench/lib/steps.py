"""Running one benchmark in processes of its own, which end with it, and reading what it left."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.lib.recording import RECORDS, Row, last_lines, read_records
from bench.lib.tiny import SWITCH

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = 8
# Where Linux tells of processes. Elsewhere a step's process group alone is ended.
PROCESSES = Path("/proc")
# Seconds for a process that was killed to be gone.
GRACE = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes:
        step: the benchmark's name.
        passed, failed, skipped: tests; a script counts as one.
        problems: what failed, and the last lines of why.
        seconds: how long it took.
        rows: what it measured.
        ran: False if there was no time left for it.
        skips: why tests were skipped, each reason once.
    """

    step: str
    passed: int
    failed: int
    skipped: int
    problems: list[str]
    seconds: float
    rows: list[Row]
    ran: bool = True
    skips: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All but the rows."""
        return {key: value for key, value in asdict(self).items() if key != "rows"}


def not_run(name: str, why: str) -> Outcome:
    """Of a step for which there was no time."""
    return Outcome(name, 0, 0, 0, [f"{name} was not run: {why}"], 0.0, [], ran=False)


def run_step(
    name: str, command: Sequence[str], limit: float, work: Path, spread: bool = False, tiny: bool = False
) -> Outcome:
    """Run a command, and end it and all that it started after `limit` seconds.

    Args:
        name: of the step, and of its files in `work`: NAME.log has what it printed.
        command: what to run.
        limit: seconds.
        work: a directory, in which it runs.
        spread: over several processes, of one thread each.
        tiny: see `bench.lib.tiny`.
    """
    work.mkdir(parents=True, exist_ok=True)
    records, log = work / f"{name}.jsonl", work / f"{name}.log"
    records.unlink(missing_ok=True)
    changes = {RECORDS: str(records)} | ({"OMP_NUM_THREADS": "1"} if spread else {}) | ({SWITCH: "1"} if tiny else {})
    environment = environment_of(os.environ | changes)
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # on Ctrl-C as well; and of a step that ended, whatever it left running
            end_all(process, records)
    return _outcome(name, code, limit, records, log, time.perf_counter() - start)


def end_all(process: subprocess.Popen[bytes], records: Path) -> None:
    """End a step's process group, and what it started in groups of their own: all that knows the step's records.

    What the kernel cannot end, as a driver does not answer, is not waited for.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    mark = f"{RECORDS}={records}".encode()
    for _ in range(3):  # one that is just being started is found the next time
        left = [found for found in map(int, filter(str.isdecimal, _listed(PROCESSES))) if mark in _environment(found)]
        for found in left:
            with contextlib.suppress(OSError):
                os.kill(found, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def environment_of(environment: dict[str, str]) -> dict[str, str]:
    """For a step: it finds what this process would, fastlock above all, and then this checkout's bench and tests.

    In this order, as the checkout's `fastlock/` alone is not the package: setup.py puts `kernels/` into it.
    """
    spec = importlib.util.find_spec("fastlock")
    places = environment["PYTHONPATH"].split(os.pathsep) if environment.get("PYTHONPATH") else []
    places += [] if spec is None or spec.origin is None else [str(Path(spec.origin).parents[1])]
    path = os.pathsep.join(dict.fromkeys([*places, str(REPOSITORY)]))
    # Nobody measures Triton's interpreter; and a step is no worker of the pytest that may have started this.
    dropped = ("TRITON_INTERPRET", "PYTEST_")
    kept = {name: value for name, value in environment.items() if not name.startswith(dropped)}
    return {"HF_HUB_OFFLINE": "1", **kept, "PYTHONPATH": path}


def pytest_command(files: Sequence[str], arguments: Sequence[str], spread: bool, tiny: bool = False) -> list[str]:
    """pytest on files of the repository, from whatever directory, with what is recorded written down."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.lib.recording"]
    command += ["-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY)]
    command += ["-p", "bench.lib.tiny"] if tiny else []
    command += ["-n", str(WORKERS)] if spread and not tiny and importlib.util.find_spec("xdist") else []
    return [*command, *(str(REPOSITORY / file) for file in files), *arguments]


def script_command(file: str, arguments: Sequence[str]) -> list[str]:
    """A script of the repository, run as a module, so that it may import others of bench."""
    return [sys.executable, "-m", file.removesuffix(".py").replace("/", "."), *arguments]


def _outcome(name: str, code: int | None, limit: float, records: Path, log: Path, seconds: float) -> Outcome:
    found = read_records(records)
    problems = [f"{test}: {error}" for test, error in found.errors.items()]
    failed = found.count("failed")
    unfinished = [test for test, outcome in found.outcomes.items() if outcome == "began"]
    if code is None or unfinished:
        ended = f"cut off after {limit:.0f} s" if code is None else f"ended with code {code}"
        where = f" in {', '.join(unfinished[:3])}" if unfinished else ""
        problems.append(f"{ended}{where}: {_tail(log)}")
        failed += max(1, len(unfinished))
    elif code != 0 and not failed:
        problems.append(f"ended with code {code}: {_tail(log)}")
        failed = 1
    passed = found.count("passed") if found.outcomes else int(code == 0)
    return Outcome(name, passed, failed, found.count("skipped"), problems, seconds, found.rows, skips=found.skips)


def _listed(directory: Path) -> list[str]:
    """The names in a directory; none where there is no such directory."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _environment(process: int) -> list[bytes]:
    """The variables of a process, NAME=VALUE each; none of one that is gone, or somebody else's."""
    try:
        return (PROCESSES / str(process) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _tail(log: Path) -> str:
    return last_lines(log.read_text(errors="replace")) or "it printed nothing"
