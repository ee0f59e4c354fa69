"""How the host's part of a planned relock is told."""

from __future__ import annotations

from bench.lib.figures import span_text
from bench.lib.report import Report, Rows
from bench.lib.tables import table

HOW_TO_READ = """\
The Python of a planned relock of Llama-3 8B's shape, the driver replaced by C functions that do nothing: median and
95 % interval of 200 means over 10 calls, between which garbage is collected. **looking up**: whether a module, tensor
or lock was moved or replaced. **launch**: packed once, so this reads the stream and calls the driver. **copying**: what
was folded, to know it again; of whole rows this is the device's work, which here is the CPU's; of few rows the host's
alone."""
PARTS = ("relock", "looking up", "launch", "copying")


def section(rows: Rows) -> list[str]:
    """A line for each number of models."""
    parts = [part for part in PARTS if all(part in row for row in rows)]  # copying was not always timed by itself
    columns = ["what", "models", "sites", *(f"{part} (95 %)" for part in parts)]
    cells = [
        [row["what"], str(row["models"]), str(row["sites"]), *(span_text(row[part]) for part in parts)] for row in rows
    ]
    return ["## What a planned relock costs the host", "", HOW_TO_READ, "", *table(columns, cells)]


def headline(rows: Rows) -> list[str]:
    """What one model takes."""
    return [f"host: {span_text(row['relock'])} a planned relock of {row['what']}" for row in rows if row["models"] == 1]


REPORT = Report(section, headline=headline)
