"""How the first relock of a process is told."""

from __future__ import annotations

from bench.lib.figures import time_text
from bench.lib.report import Report, Rows
from bench.lib.tables import table

HOW_TO_READ = """\
A model of Llama-3 8B's shape in bfloat16, on the device, in a fresh process: from the call of `fastlock.relock` until
the device is done; everything imported and the context ready before. Medians over the processes. **cubin**: the kernel
that was compiled ahead of time. **JIT, compiled before**: Triton finds it in its cache. **JIT**: the cache is empty."""


def section(rows: Rows) -> list[str]:
    """A line for each way."""
    columns = ["way", "processes", "first relock", "fastest", "second relock"]
    cells = [
        [row["way"], str(row["processes"]), *(time_text(row[key]) for key in ("first", "fastest", "second"))]
        for row in rows
    ]
    return ["## The first relock of a process", "", HOW_TO_READ, "", *table(columns, cells)]


def headline(rows: Rows) -> list[str]:
    """The first relock by every way."""
    return ["first relock: " + ", ".join(f"{time_text(row['first'])} by {row['way']}" for row in rows)]


REPORT = Report(section, headline=headline)
