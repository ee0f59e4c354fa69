"""How the counters of the fold kernel are told."""

from __future__ import annotations

from bench.lib.figures import time_text
from bench.lib.report import Report, Rows
from bench.lib.tables import table

HOW_TO_READ = """\
One launch of each kind of the fold kernel, bfloat16, caches emptied before, as `ncu` counts it. **bytes from DRAM**:
over those of the locked columns and biases; where it is far above 100 %, something is read twice, or more is read than
is needed. **of DRAM**: of what its memory can move at most, which a copy does not reach either. **warps**: of those
that a multiprocessor can hold, how many it did. **issued**: of its cycles, in how many it began an instruction."""
COLUMNS = ("models", "kind", "took", "bytes from DRAM", "of DRAM", "warps", "issued", "registers")


def section(rows: Rows) -> list[str]:
    """A line for each kind and number of models."""
    cells = []
    for row in rows:
        percents = [f"{row[key]:.0f}%" for key in ("dram_percent", "warps_percent", "issue_percent")]
        line = [f"{row['shape']} × {row['models']}", row["kind"], time_text(row["seconds"])]
        cells.append([*line, f"{row['dram_bytes'] / row['bytes']:.0%}", *percents, f"{row['registers']:.0f}"])
    return ["## The fold kernel's counters", "", HOW_TO_READ, "", *table(COLUMNS, cells)]


REPORT = Report(section)
