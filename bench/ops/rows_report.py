"""How the projection with a lock per row is told."""

from __future__ import annotations

from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.tables import table

HOW_TO_READ = """\
One output projection of the shape of Llama-3 8B (4096 x 4096) or 70B (8192 x 8192) with random weights; 8 locks of 2
heads, a lock for three of four requests. Up to 64 rows each row is a request, above that 8 prompts of equal length.

- **linear**: `F.linear` without a bias, which all others are compared with; **linear and bias**: with one; **hook**: d
  gathered and added to x before it, as a forward pre-hook would.
- **shift**, **gather**: Triton's projection, d added to x as it is read, or the fold added to its sums, by the
  fastest of its tiles; **add**, **around**: torch's projection, the fold added to y after it, or d to the locked
  columns of x before it, which get back what they held; **torch**: by torch alone; **chosen**: what the op took, and
  which that was.
- **median**: of one projection, in brackets the 95 % interval of the median (order statistics). On a GPU: between two
  events around a CUDA graph that runs through several weights, together at least 4 times the L2 cache. **over linear**:
  the median of the ratios to `linear` of the same round; the ways take turns.
- **error**: the largest against float64, over some rows, in units of the bound that every way is held to (x + d and y
  rounded to the dtype, a float32 sum): right if at most 1. The hook rounds d once more and is not held to it."""


def section(rows: Rows) -> list[str]:
    """A table for each shape."""
    lines = ["## Locks per request", "", HOW_TO_READ, ""]
    head = ["rows", "way", "tile", "median (95 %)", "over linear (95 %)", "error"]
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        of_size = [row for row in rows if (row["size"], row["dtype"]) == (size, dtype)]
        lines += [f"### {size}, {of_size[0]['hidden']} x {of_size[0]['hidden']}, {dtype}, {of_size[0]['device']}", ""]
        lines += table(head, [cells for row in of_size for cells in _cells(row)])
    return lines


def _cells(row: Row) -> list[list[str]]:
    lines = []
    for name, way in row["ways"].items():
        (median, low, high), (ratio, least, most) = way["seconds"], way["ratio"]
        span = f"{median * 1e6:.4g} µs ({low * 1e6:.4g}–{high * 1e6:.4g})"
        over = "" if name == "linear" else f"{ratio:.3f} ({least:.3f}–{most:.3f})"
        error = "" if way["error_in_bounds"] is None else f"{way['error_in_bounds']:.2g}"
        lines.append([str(row["rows"]), name, way["tile"], span, over, error])
    return lines


def headline(rows: Rows) -> list[str]:
    """What the way that was chosen takes, over the plain projection."""
    chosen = [(row, row["ways"]["chosen"]["ratio"]) for row in rows if "chosen" in row["ways"]]
    ratios = ", ".join(f"{row['size']} x {row['rows']} rows {ratio[0]:.2f}" for row, ratio in chosen)
    return [f"rows, over linear: {ratios}"]


REPORT = Report(section, headline=headline)
