"""How the fold of resident adapters is told."""

from __future__ import annotations

from bench.lib.figures import time_text
from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.ways_report import launch_headline, ways_table

HOW_TO_READ = """\
Random LoRAs of the shape of Llama-3 8B over one base in bfloat16. No model was downloaded.

- **launch**: the kernel alone, its table made before; on a GPU between two events. **call**: `fastlock.fold_adapters`
  from the adapters as they lie, by the host's clock, W d, checks and the table included. **torch**: two batched
  products a layer, in the adapters' dtype.
- **median**: of one fold of all adapters; in brackets the 95 % interval of the median.
- **of copy**: the bytes that must be moved (the locked columns of A, B, and the results) over the median, over the
  bandwidth of a large `copy_` measured just before on the same device.
- **error**: the largest of two adapters against float64, in units of the kernel's bound. Ours is held to 1."""


def section(rows: Rows) -> list[str]:
    """How to read it, and a table for each rank and dtype."""
    lines = ["## Resident adapters", "", HOW_TO_READ, ""]
    for row in rows:
        by = f", launched by {row['launched_by']}; the table takes {time_text(row['table_seconds'])}"
        lines += [f"### {_what(row)}, {row['device']}", ""]
        lines += [f"{row['bytes'] / 1e6:.4g} MB{by if row['launched_by'] else ''}; {row['rounds']} rounds.", ""]
        lines += ways_table(row)
    return lines


def headline(rows: Rows) -> list[str]:
    """What the kernel reaches on a GPU."""
    return launch_headline("adapters", rows, _what)


def _what(row: Row) -> str:
    return f"{row['adapters']} adapters of rank {row['rank']}, {row['dtype']}, {row['layers']} layers"


REPORT = Report(section, headline=headline)
