"""How the fold of gates is told."""

from __future__ import annotations

from bench.lib.figures import time_text
from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.ways_report import launch_headline, ways_table

HOW_TO_READ = """\
Gates written into random models of the shape of Llama-3 8B in bfloat16. No model was downloaded.

- **launch**: the kernel alone, its table made before; on a GPU between two events. **plan**: `GateFoldPlan.run` by the
  host's clock, the check for what is not finite included; on a CPU the reference, in float64. **torch**: a plain
  script, two products a layer in bfloat16 (C U, then `addmm` with V), copied into W where heads are scattered.
- **median**: of one model; in brackets the 95 % interval of the median.
- **of copy**: the bytes that must be moved (the locked columns, read once and written once) over the median, over the
  bandwidth of a large `copy_` measured just before on the same device.
- **error**: the largest of some rows against float64, in units of the kernel's bound. Ours is held to 1; the script
  rounds C U to bfloat16 on its way."""


def section(rows: Rows) -> list[str]:
    """How to read it, and a table for each case."""
    lines = ["## Gates", "", HOW_TO_READ, ""]
    for row in rows:
        by = f", `{row['variant']}` launched by {row['launched_by']}" if row["launched_by"] else ""
        by += f"; the table takes {time_text(row['table_seconds'])}" if by else ""
        lines += [f"### {_what(row)}, {row['device']}", ""]
        lines += [f"{row['bytes'] / 1e6:.4g} MB a model, {row['models']} of them{by}; {row['rounds']} rounds.", ""]
        lines += ways_table(row)
    return lines


def headline(rows: Rows) -> list[str]:
    """What the kernel reaches on a GPU."""
    return launch_headline("gates", rows, _what)


def _what(row: Row) -> str:
    return f"rank {row['rank']}, {row['heads']}, {row['layers']} layers"


REPORT = Report(section, headline=headline)
