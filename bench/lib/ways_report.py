"""How several ways to do the same are told, each against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable

from bench.lib.figures import span_text
from bench.lib.recording import Row
from bench.lib.report import Rows
from bench.lib.tables import table


def ways_table(row: Row) -> list[str]:
    """A line for each way: its median, the share of the copy's bandwidth, and its error."""
    cells = [
        [f"`{name}`", span_text(way["seconds"]), f"{_of_copy(row, name):.0%}", f"{way['error_in_bounds']:.2g}"]
        for name, way in row["ways"].items()
    ]
    return table(["way", "median (95 %)", "of copy", "error"], cells)


def launch_headline(name: str, rows: Rows, what: Callable[[Row], str]) -> list[str]:
    """What the kernel reaches on a GPU."""
    figures = [f"{what(row)}: {_of_copy(row, 'launch'):.0%}" for row in rows if "launch" in row["ways"]]
    return [f"{name}, of the copy: {'; '.join(figures)}"] if figures else []


def _of_copy(row: Row, name: str) -> float:
    return float(row["bytes"] / row["ways"][name]["seconds"][0] / row["copy_bytes_per_second"])
