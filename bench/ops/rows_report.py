"""How the projection with a lock per row is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
  the median of the ratios to `linear` of the same round, less one; the ways take turns.
- **of copy**, on a GPU up to 64 rows, where the time is that of reading W: the bytes of W, x and y, once each, over the
  median, over the bandwidth of a large `copy_` (read plus written) on the same device, measured just before. The aim
  for the way that is chosen is at least 85 % up to 64 rows, and above that at most 1 % over `linear`.
- **error**: the largest against float64, over some rows, in units of the bound that every way is held to (x + d and y
  rounded to the dtype, a float32 sum): right if at most 1. The hook rounds d once more and is not held to it."""


def section(rows: Rows) -> list[str]:
    """A table for each shape."""
    lines = ["## Locks per request", "", HOW_TO_READ, ""]
    head = ["rows", "way", "tile", "median (95 %)", "of copy", "over linear (95 %)", "error"]
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
        over = "" if name == "linear" else f"{_over(ratio)} ({_over(least)} to {_over(most)})"
        error = "" if way["error_in_bounds"] is None else f"{way['error_in_bounds']:.2g}"
        lines.append([str(row["rows"]), name, way["tile"], span, _of_copy(row, name), over, error])
    return lines


def _of_copy(row: Row, name: str) -> str:
    """The bandwidth of a way over the copy's, where that is what the time is made of: a CPU has W in its cache."""
    if not row["device"].startswith("cuda") or not row["decode"]:  # of a CPU, older rows do not say how many bytes
        return ""
    rate = row["bytes"] / row["ways"][name]["seconds"][0]
    return f"{rate / row['copy_bytes_per_second']:.0%}"


def _over_linear(row: Row, name: str) -> str:
    return _over(row["ways"][name]["ratio"][0])


def _over(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def headline(rows: Rows) -> list[str]:
    """What the way that was chosen makes of the copy's bandwidth, or takes over the plain projection."""
    rows = [row for row in rows if "chosen" in row["ways"]]
    decode = [row for row in rows if _of_copy(row, "chosen")]
    lines = [_line("up to 64 rows, chosen, of copy (aim: 85 % or more)", decode, lambda row: _of_copy(row, "chosen"))]
    for name in ("chosen", "around"):
        of_name = [row for row in rows if name in row["ways"] and not row["decode"]]
        what = f"more rows, {name}, over linear (aim: +1 % or less)"
        lines.append(_line(what, of_name, partial(_over_linear, name=name)))
    return [line for line in lines if line]


def _line(what: str, rows: Rows, figure: Callable[[Row], str]) -> str:
    figures = ", ".join(f"{row['size']} x {row['rows']}: {figure(row)}" for row in rows)
    return figures and f"rows, {what}: {figures}"


REPORT = Report(section, headline=headline)
