"""How the fold of resident adapters is told."""

from __future__ import annotations

from bench.lib.figures import span_text, time_text
from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.tables import table

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
        cells = [
            [f"`{name}`", span_text(way["seconds"]), f"{_of_copy(row, name):.0%}", f"{way['error_in_bounds']:.2g}"]
            for name, way in row["ways"].items()
        ]
        lines += table(["way", "median (95 %)", "of copy", "error"], cells)
    return lines


def headline(rows: Rows) -> list[str]:
    """What the kernel reaches on a GPU."""
    on_gpu = [row for row in rows if "launch" in row["ways"]]
    figures = [f"{_what(row)}: {_of_copy(row, 'launch'):.0%}" for row in on_gpu]
    return [f"adapters, of the copy: {'; '.join(figures)}"] if figures else []


def _what(row: Row) -> str:
    return f"{row['adapters']} adapters of rank {row['rank']}, {row['dtype']}, {row['layers']} layers"


def _of_copy(row: Row, name: str) -> float:
    return float(row["bytes"] / row["ways"][name]["seconds"][0] / row["copy_bytes_per_second"])


REPORT = Report(section, headline=headline)
