"""What a step leaves for run.py: a line of JSON for whatever happened, in the file that the environment names.

As a pytest plugin (`-p bench.lib.recording`) it writes down each test as it begins and ends, with what the test
recorded by `record_property("row", {...})`; a script calls `record_row`. What was written before a crash, or before the
step's time was up, stays.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

RECORDS = "FASTLOCK_BENCH_RECORDS"
ROW = "row"
# Of an error: that many of its last lines, none longer than that.
ERROR_LINES, ERROR_COLUMNS = 6, 300

Row = dict[str, Any]


@dataclass
class Records:
    """What a step wrote.

    Attributes:
        rows: what was measured, in order.
        outcomes: of each test that began: passed, failed, skipped, or began.
        errors: the last lines of each failed test's error.
        skips: why tests were skipped, each reason once.
    """

    rows: list[Row] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    skips: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """How many tests came to this."""
        return list(self.outcomes.values()).count(outcome)


def record_row(row: Row) -> None:
    """Keep a row of a script's results; nothing where no run.py asked for it."""
    _write({ROW: row})


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _write_once({"began": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A phase of a test ended: its setup, the test itself, or its teardown."""
    rows = [value for name, value in report.user_properties if name == ROW] if report.when == "call" else []
    line = {"test": report.nodeid, "phase": report.when, "outcome": report.outcome, "rows": rows}
    _write_once(line | {"error": error_of(report) if report.failed else reason_of(report)})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file could not be collected."""
    if report.failed:
        name = report.nodeid or "collecting"
        _write_once({"test": name, "phase": "collect", "outcome": "failed", "rows": [], "error": error_of(report)})


def reason_of(report: pytest.TestReport) -> str:
    """Why a test was skipped, in a line; of any other test, nothing."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return ""
    return " ".join(report.longrepr[2].removeprefix("Skipped: ").split())[:ERROR_COLUMNS]


def error_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The last lines of what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return last_lines(report.longreprtext if crash is None else crash.message)


def last_lines(text: str) -> str:
    """The last lines that are not empty."""
    lines = [line.rstrip()[:ERROR_COLUMNS] for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-ERROR_LINES:])


def read_records(path: Path) -> Records:
    """What was written to a file; a last line that was cut off does not count."""
    records = Records()
    if not path.is_file():
        return records
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "began" in line:
            records.outcomes.setdefault(line["began"], "began")
        elif "test" in line:
            _add_phase(records, line)
        else:
            records.rows.append(line[ROW])
    return records


def _add_phase(records: Records, line: dict[str, Any]) -> None:
    """A test passed where all its phases did, its teardown too."""
    name, outcome = line["test"], line["outcome"]
    records.rows += line["rows"]
    before = records.outcomes.get(name, "began")
    if outcome == "failed":
        records.errors.setdefault(name, line["error"])
        records.outcomes[name] = "failed"
    elif before == "began" and (outcome == "skipped" or line["phase"] == "teardown"):
        records.outcomes[name] = outcome
        if line["error"] and line["error"] not in records.skips:
            records.skips.append(line["error"])


def _write_once(line: dict[str, Any]) -> None:
    """Not in the processes that pytest-xdist starts: they tell the first one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _write(line)


def _write(line: dict[str, Any]) -> None:
    path = os.environ.get(RECORDS)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
