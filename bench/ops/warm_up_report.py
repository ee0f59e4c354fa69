"""How the warm-up is told."""

from __future__ import annotations

from bench.lib.figures import time_text, yes_text
from bench.lib.report import Report, Rows
from bench.lib.tables import table

NOTE = "The first process on the machine, before anything was measured: what it did, and what it found."


def section(rows: Rows) -> list[str]:
    """A line for each part."""
    parts = [row for row in rows if "part" in row]
    cells = [[row["part"], yes_text(row["done"]), time_text(row["seconds"]), row["found"]] for row in parts]
    return ["## The warm-up", "", NOTE, "", *table(["part", "done", "took", "found"], cells)]


def headline(rows: Rows) -> list[str]:
    """What could not be done; nothing else of it matters later."""
    return [f"warm-up: {row['part']}: {row['found']}" for row in rows if not row.get("done", True)]


REPORT = Report(section, headline=headline)
