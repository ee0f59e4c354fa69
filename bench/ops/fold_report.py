"""How the fold's benchmark is told: the tables, and the picture under the roofs of the same run."""

from __future__ import annotations

from bench.lib.figures import span_text, time_text, yes_text
from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.roofline import picture
from bench.lib.tables import table

HOW_TO_READ = """\
- A **lock** shifts some attention heads; the **fold** b = W d turns the shift into a bias, one per locked layer.
  Weights are random, of the shape of Llama-3 8B and 70B; no model was downloaded.
- **starts from**: what was ready before the clock started: the lock; d (its product, on the device, in the form that
  the path wants); the kernel's table on the device; a plan, which relocked once before.
- **median**: of whole calls by the host's clock, the device waited for, launches and Python included; in brackets
  the 95 % interval of the median (order statistics). **fastest**: the fastest call. **rounds**: how many calls.
- **GB/s**: bytes counted over the median, 10⁹ bytes a second. Counted are the weights that the path must read (the
  locked columns; for `linear` and `authors` the whole matrices) and the biases written, once each. **of copy**: that
  over the bandwidth of a large `copy_` (read plus written), measured just before on the same device. A path that
  reads fewer bytes is faster at the same GB/s; one that only reads can pass 100 %.
- **vs authors**: the time of the authors' way (float16, same shape and lock, same run) over this path's, per model;
  **vs linear**: that of `linear`, in the same dtype. Both of cold weights, one model a call.
- **right**: every number within `kernels/fold/reference.py`'s `error_bound` of float64: one unit in the last place,
  plus the bound of a float32 sum; in brackets the largest error in units of that bound. Checked on what the last timed
  call returned. `columns`, `linear` and `authors` sum in other precisions and are not held to it, only to 2 % in norm.
- The calls rotate among models; **cold**: the bytes of the whole rotation are at least 4 times the cache. **warm**:
  one model again and again, so that what fits the cache is read from there. Results are filled with NaN before."""
ON_DEVICE = """\
- **on the device**: between two CUDA events around the call, queued while the GPU still read a 2 GiB buffer over and
  over, which empties the L2 cache and keeps the host's pace out (warm: while it waited, after the same call); for paths
  in which the host never waits for the GPU.
  The ratio there is to `linear` in float16: the authors' products alone, without their copies to the GPU."""
ON_CPU = """\
- On a CPU, `fold` and `relock` run the reference: float64 products of the locked columns. There is no CPU kernel."""
OF_ROOFLINE = """\
Bytes counted a second against bytes counted in a call, both logarithmic; bfloat16, cold. The level roof is the copy
bandwidth of the same run; on a GPU the slanted one is what a launch takes that folds next to nothing. Dots: on the
device, where that was measured, else by the host's clock."""

COLUMNS = (
    "path",
    "models a call",
    "median (95 %)",
    "fastest",
    "rounds",
    "GB/s",
    "of copy",
    "vs authors",
    "vs linear",
    "right",
    "cold",
)
COLUMNS_ON_GPU = ("on the device (95 %)", "GB/s", "of copy", "vs `linear` float16")
# What the summary tells of: paths, and how many models a call.
HEADLINES = (("launch", 1), ("plan", 1), ("plan", 8), ("plan", 64), ("relock", 1))


OF_KINDS = """\
Every kind of the fold kernel (docs/fold-kernel.md) on the same cold models, in turn, in bfloat16.

- **model**: what `bench/lib/fold_model.py` says, which knows nothing of this machine.
- **between events**: median and 95 % interval between two CUDA events around one launch, after the L2 was emptied.
  **events alone** is what two events cost with nothing between them; **without events** has that taken off.
- **in a graph**: a launch of many in one CUDA graph, which rotates among models: no events, no gap.
- **of copy**: bytes of the locked columns and biases a second over those of a large `copy_`, by the graph."""
KIND_COLUMNS = (
    "models",
    "kind",
    "model",
    "between events (95 %)",
    "events alone",
    "without events",
    "in a graph (95 %)",
    "of copy",
    "right",
)


def section(rows: Rows) -> list[str]:
    """The kinds of kernel; then how to read the paths, what they are, and a table for each shape and dtype."""
    kinds, paths = [row for row in rows if "kind" in row], [row for row in rows if "kind" not in row]
    return [*(_kinds(kinds) if kinds else []), *(_paths(paths) if paths else [])]


def _kinds(rows: Rows) -> list[str]:
    cells = []
    for row in rows:
        name = f"{row['kind']} (default)" if row["kind"] == row["default"] else row["kind"]
        line = [f"{row['shape']} × {row['models']}", name, time_text(row["model_seconds"])]
        line += [span_text(row[key]) if row[key] else "not measured" for key in ("device_seconds", "events_seconds")]
        both = row["device_seconds"] and row["events_seconds"]
        line.append(time_text(row["device_seconds"][0] - row["events_seconds"][0]) if both else "not measured")
        line.append(span_text(row["graph_seconds"]) if row["graph_seconds"] else "not measured")
        line += [_share(row), f"{yes_text(row['matches'])} ({row['error_in_bounds']:.2g})"]
        cells.append(line)
    return ["## The kinds of the fold kernel", "", OF_KINDS, "", *table(KIND_COLUMNS, cells)]


def _share(row: Row) -> str:
    """Of the copy's bandwidth, in a graph."""
    if not row["graph_seconds"]:
        return ""
    return f"{row['bytes'] / row['graph_seconds'][0] / row['copy_bytes_per_second']:.0%}"


def _fastest(rows: Rows) -> list[str]:
    """For each workload the kind that took least in a graph, and what the default took: a line in all."""
    told = []
    for case in dict.fromkeys((row["shape"], row["models"]) for row in rows):
        timed = {r["kind"]: r for r in rows if (r["shape"], r["models"]) == case and r["graph_seconds"]}
        if not timed:
            continue
        best = min(timed.values(), key=lambda row: row["graph_seconds"][0])
        line = f"{case[0]} x {case[1]} {best['kind']} {time_text(best['graph_seconds'][0])}, {_share(best)}"
        default = timed.get(best["default"])
        if default is not None and default is not best:
            line += f" (default {best['default']} {time_text(default['graph_seconds'][0])})"
        told.append(line)
    return [f"fastest kinds, of copy: {'; '.join(told)}"] if told else []


def _paths(rows: Rows) -> list[str]:
    on_gpu = rows[0]["device"].startswith("cuda")
    lines = ["## How to read the tables of the fold", "", HOW_TO_READ, ON_DEVICE if on_gpu else ON_CPU, ""]
    whats = {row["path"]: [f"`{row['path']}`", row["starts_from"], row["what"]] for row in rows}
    lines += table(["path", "starts from", "what it is"], list(whats.values()))
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        lines += _table(shape, dtype, rows, on_gpu)
    return [*lines, *(["## Roofline", "", OF_ROOFLINE, ""] if picture(rows) else [])]


def headline(rows: Rows) -> list[str]:
    """The fastest kinds; of Llama-3 8B in bfloat16, cold, what some paths take, of the copy, against the authors."""
    lines = _fastest([row for row in rows if "kind" in row])
    rows = [row for row in rows if "kind" not in row]
    for path, models in HEADLINES:
        for row in rows:
            if (row["shape"], row["dtype"], row["path"], row["models"]) != ("8B", "bfloat16", path, models):
                continue
            if row["warm"]:
                continue
            span, _, of_copy, ratio = _timing(row, "seconds", _per_model(rows, "8B", "float16", "authors", "seconds"))
            line = f"fold, 8B bfloat16, {path} x {models}: {span}, {of_copy} of copy, {ratio or '?'} the authors' way"
            if row["device_seconds"]:
                on_device = _timing(row, "device_seconds", None)
                line += f"; on the device {on_device[0]}, {on_device[2]} of copy"
            lines.append(line)
    return lines


def _table(shape: str, dtype: str, every: Rows, on_gpu: bool) -> list[str]:
    rows = [row for row in every if (row["shape"], row["dtype"]) == (shape, dtype)]
    columns = [*COLUMNS, *(COLUMNS_ON_GPU if on_gpu else ())]
    authors = _per_model(every, shape, "float16", "authors", "seconds")
    of_layers = _per_model(every, shape, dtype, "linear", "seconds")
    linear = _per_model(every, shape, "float16", "linear", "device_seconds")
    cells = []
    for row in rows:
        median, *rates = _timing(row, "seconds", authors)
        line = [f"`{row['path']}`", str(row["models"]), median, time_text(row["fastest_seconds"]), str(row["rounds"])]
        line += [*rates, _ratio(row, "seconds", of_layers)]
        line += [f"{yes_text(row['matches'])} ({row['error_in_bounds']:.2g})"]
        line += ["warm" if row["warm"] else yes_text(row["cold"])]
        cells.append(line + (_timing(row, "device_seconds", linear) if on_gpu else []))
    note = f"Lock: {rows[0]['lock']}. Copy: {rows[0]['copy_bytes_per_second'] / 1e9:.4g} GB/s."
    return [f"## Shape of Llama-3 {shape}, {dtype}", "", note, "", *table(columns, cells)]


def _timing(row: Row, key: str, authors: float | None) -> list[str]:
    """Median and interval, GB/s, fraction of the copy, ratio to the authors' way."""
    if not row[key]:
        return [""] * 4
    rate = row["bytes"] / row[key][0]
    of_copy = rate / row["copy_bytes_per_second"]
    return [span_text(row[key]), f"{rate / 1e9:.3g}", f"{of_copy:.0%}", _ratio(row, key, authors)]


def _ratio(row: Row, key: str, other: float | None) -> str:
    """The other's time over this row's, per model."""
    return f"{other * row['models'] / row[key][0]:.3g}×" if other else ""


def _per_model(rows: Rows, shape: str, dtype: str, path: str, key: str) -> float | None:
    """What a path takes with one cold model; None where that was not measured."""
    wanted = (shape, dtype, path, 1, False)
    intervals = [r[key] for r in rows if (r["shape"], r["dtype"], r["path"], r["models"], r["warm"]) == wanted]
    return float(intervals[0][0]) if intervals and intervals[0] else None


REPORT = Report(section, picture, headline)
