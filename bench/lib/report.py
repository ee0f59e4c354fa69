"""From what pytest and pytest-benchmark wrote to what is kept under bench/results/."""

from __future__ import annotations

import json
import math
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from bench.lib.tables import table
from bench.ops import rows_report

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
- **right**: every number within `fastlock.reference.error_bound` of float64: one unit in the last place, plus the
  bound of a float32 sum; in brackets the largest error in units of that bound. Checked on what the last timed call
  returned. `columns`, `linear` and `authors` sum in other precisions and are not held to it, only to 2 % in norm.
- The calls rotate among models; **cold**: the bytes of the whole rotation are at least 4 times the cache. **warm**:
  one model again and again, so that what fits the cache is read from there. Results are filled with NaN before."""
ON_DEVICE = """\
- **on the device**: between two CUDA events around the call, queued while the GPU still read a 2 GiB buffer over and
  over, which empties the L2 cache and keeps the host's pace out (warm: while it waited, after the same call); for paths
  in which the host never waits for the GPU.
  The ratio there is to `linear` in float16: the authors' products alone, without their copies to the GPU."""
ON_CPU = """\
- On a CPU, `fold` and `relock` run the reference: float64 products of the locked columns. There is no CPU kernel."""

OF_CHECKPOINTS = """\
Checkpoints of the shape of Llama-3 8B and 70B, Mistral-Large-2 (123B; as a Llama) and SmolLM2-135M in bfloat16; only
the locked layers' output projections hold numbers, the rest is holes in the files. "Locked layers" are the whole
output projections of the locked layers.

- `relock_checkpoint`: from the call until the new directory is on the disk (it syncs what it writes).
- `populate`: fresh mappings of the locked layers by one thread, every page there (MADV_POPULATE_READ): the least that
  reading them through a mapping can take. The page cache held them in **large** folios (mapped 2 MiB at a time, as far
  as the part given says) or in **small** ones (4 kB each): it depends on who read or wrote the file before, and how.
- `read and fold`: the authors' way without writing, by us: each locked layer's whole weight by safetensors'
  `safe_open`, and `F.linear` in the weight's dtype.
- `write`: files of the same sizes as those that `relock_checkpoint` writes, each synced, then the directories.
- `load, add, save`: the authors' way on the whole checkpoint: `from_pretrained`, biases put in, `save_pretrained`;
  nothing is synced.
- **median**: by the host's clock, in brackets its 95 % interval (order statistics); the ways took turns in one process,
  the page cache warm. **relock over this**: the time of `relock_checkpoint` over that of this way in the same round,
  median and 95 % interval."""
OF_WATCHING = """\
One relock each, in a fresh process that relocked a tiny checkpoint before. **Cold**: the page cache held nothing of the
checkpoint. Read and written: from and to the disk, as /proc/self/io counts. **Peak memory**: the highest resident set
over that just before, mapped pages of the page cache included; it is to be below 200 MB. What is read is to be at most
the locked layers, in whole pages, and the headers, index and config; around them lie numbers, not holes."""

OF_FIRST = """\
A model of Llama-3 8B's shape in bfloat16, on the device, in a fresh process: from the call of `fastlock.relock` until
the device is done; everything imported and the context ready before. Medians over the processes. **cubin**: the kernel
that was compiled ahead of time. **JIT, compiled before**: Triton finds it in its cache. **JIT**: the cache is empty."""


OF_ROOFLINE = """\
Bytes counted a second against bytes counted in a call, both logarithmic; bfloat16, cold. The level roof is the copy
bandwidth of the same run; on a GPU the slanted one is what a launch takes that folds next to nothing. Dots: on the
device, where that was measured, else by the host's clock."""

OF_HOST = """\
The Python of a planned relock of Llama-3 8B's shape, the driver replaced by C functions that do nothing: median and
95 % interval of 200 means over 50 calls. **looking up**: whether a module, tensor or lock was moved or replaced.
**launch**: packed once, so reading the stream and calling the driver."""


def interval_of_median(values: list[float]) -> list[float] | None:
    """The median and its 95 % interval by order statistics: [median, low, high]; the extremes below 6 values."""
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while below + 1 < n / 2 and tail + math.comb(n, below + 1) * 0.5**n <= 0.025:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return [statistics.median(ordered), ordered[below], ordered[n - 1 - below]]


def benchmarks(file: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per benchmark of a pytest-benchmark file, without the single times."""
    rows = []
    for entry in file.get("benchmarks", []):
        if "path" not in entry["extra_info"]:  # it raised before its result was checked
            continue
        times = entry["stats"]["data"]
        rows.append(
            {
                **entry["extra_info"],
                "seconds": interval_of_median(times),
                "fastest_seconds": min(times),
                "rounds": len(times),
            }
        )
    return rows


def outcome(junit: Path, step: str) -> dict[str, Any]:
    """What a pytest run came to: counts, and the names of what did not pass."""
    result: dict[str, Any] = {"step": step, "passed": 0, "failed": 0, "skipped": 0, "not_passed": []}
    if not junit.is_file():
        return result | {"failed": 1, "not_passed": ["pytest wrote no report"]}
    for case in ET.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        result[kind] += 1
        if kind != "passed":
            result["not_passed"].append(f"{kind}: {case.get('classname')}::{case.get('name')}")
    return result


def parity(junit: Path) -> list[dict[str, Any]]:
    """The recorded errors of parity.py: per kind of test the cases, and the worst of them."""
    if not junit.is_file():
        return []
    groups: dict[str, list[tuple[float, str]]] = {}
    for case in ET.parse(junit).iter("testcase"):
        recorded = {p.get("name"): p.get("value") or "" for p in case.iter("property")}
        if "error" in recorded:
            groups.setdefault(recorded["what"], []).append((float(recorded["error"]), recorded["case"]))
    return [
        {"what": what, "cases": [name for _, name in found], "error_in_bounds": max(found)[0], "worst": max(found)[1]}
        for what, found in groups.items()
    ]


def recorded(junit: Path, name: str) -> list[dict[str, Any]]:
    """What the tests recorded under a name, as JSON."""
    if not junit.is_file():
        return []
    found = [p for case in ET.parse(junit).iter("testcase") for p in case.iter("property")]
    return [json.loads(p.get("value") or "{}") for p in found if p.get("name") == name]


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    device = result["machine"]["device"]
    on_gpu = not device.startswith("CPU")
    lines = [f"# Benchmarks on {device}, {result['date']}", ""]
    lines += [
        f"Written by `{result['command']}` ({result['took_seconds']:.0f} s); the same numbers are in {result['json']}.",
        "",
    ]
    lines += table(["", ""], [[key, value] for key, value in result["machine"].items()])
    lines += _outcomes(result["steps"])
    if result["parity"]:
        lines += _parity(result["parity"])
    if result["first"]:
        lines += _first(result["first"])
    if result["host"]:
        lines += _host(result["host"])
    if result["rows"]:
        lines += rows_report.section(result["rows"])
    if result["benchmarks"]:
        if result["picture"]:
            lines += ["## Roofline", "", f"![bytes a second]({result['picture']})", "", OF_ROOFLINE, ""]
        lines += ["## How to read the tables", "", HOW_TO_READ, ON_DEVICE if on_gpu else ON_CPU, ""]
        lines += _paths(result["benchmarks"])
    for key in dict.fromkeys((row["shape"], row["dtype"]) for row in result["benchmarks"]):
        lines += _section(*key, result["benchmarks"], on_gpu)
    if result["checkpoints"]:
        lines += _checkpoints(result["checkpoints"])
    return "\n".join(lines).rstrip() + "\n"


def _outcomes(steps: list[dict[str, Any]]) -> list[str]:
    rows = [[step["step"], *(str(step[key]) for key in ("passed", "failed", "skipped"))] for step in steps]
    lines = ["## Tests and checks of this run", "", *table(["step", "passed", "failed", "skipped"], rows)]
    rest = [f"- {name}" for step in steps for name in step["not_passed"]]
    return lines + (["Not passed:", "", *rest, ""] if rest else [])


def _parity(groups: list[dict[str, Any]]) -> list[str]:
    rows = [[g["what"], str(len(g["cases"])), f"{g['error_in_bounds']:.2f}", g["worst"]] for g in groups]
    note = "Largest error against float64 in units of `fastlock.reference.error_bound`: right if at most 1."
    return ["## Parity on the device", "", note, "", *table(["what", "cases", "largest error", "where"], rows)]


def _first(rows: list[dict[str, Any]]) -> list[str]:
    head = ["way", "processes", "first relock", "fastest", "second relock"]
    cells = [
        [row["way"], str(row["processes"]), *(_time(row[key]) for key in ("first", "fastest", "second"))]
        for row in rows
    ]
    return ["## The first relock of a process", "", OF_FIRST, "", *table(head, cells)]


def _host(rows: list[dict[str, Any]]) -> list[str]:
    head = ["what", "models", "sites", "relock (95 %)", "looking up (95 %)", "launch (95 %)"]
    cells = [
        [
            row["what"],
            str(row["models"]),
            str(row["sites"]),
            *(_span(row[k]) for k in ("relock", "looking up", "launch")),
        ]
        for row in rows
    ]
    return ["## What a planned relock costs the host", "", OF_HOST, "", *table(head, cells)]


def _paths(rows: list[dict[str, Any]]) -> list[str]:
    whats = {row["path"]: [f"`{row['path']}`", row["starts_from"], row["what"]] for row in rows}
    return table(["path", "starts from", "what it is"], list(whats.values())) if whats else []


def _section(shape: str, dtype: str, every: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    rows = [row for row in every if (row["shape"], row["dtype"]) == (shape, dtype)]
    first = rows[0]
    head = [
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
    ]
    if on_gpu:
        head += ["on the device (95 %)", "GB/s", "of copy", "vs `linear` float16"]
    authors = _per_model(every, shape, "float16", "authors", "seconds")
    of_layers = _per_model(every, shape, dtype, "linear", "seconds")
    linear = _per_model(every, shape, "float16", "linear", "device_seconds")
    cells = []
    for row in rows:
        line = [f"`{row['path']}`", str(row["models"]), *_timing(row, "seconds", authors)]
        line[3:3] = [_time(row["fastest_seconds"]), str(row["rounds"])]
        line += [_ratio(row, "seconds", of_layers)]
        line += [f"{_yes(row['matches'])} ({row['error_in_bounds']:.2g})", "warm" if row["warm"] else _yes(row["cold"])]
        cells.append(line + (_timing(row, "device_seconds", linear) if on_gpu else []))
    title = f"## Shape of Llama-3 {shape}, {dtype}"
    note = f"Lock: {first['lock']}. Copy: {first['copy_bytes_per_second'] / 1e9:.4g} GB/s."
    return [title, "", note, "", *table(head, cells)]


def _checkpoints(every: list[dict[str, Any]]) -> list[str]:
    lines = ["## Checkpoints on disk", "", OF_CHECKPOINTS, ""]
    locks = {row["shape"]: [row["shape"], row["lock"], *_locked(row)] for row in every}
    lines += table(["shape", "lock", "locked layers", "locked columns"], list(locks.values()))
    head = ["shape", "page cache", "way", "median (95 %)", "fastest", "rounds", "relock over this (95 %)"]
    timed = [row for row in every if row["kind"] in ("times", "loading")]
    lines += table(head, [[row["shape"], _pages(row), *line] for row in timed for line in _ways(row["rows"])])
    head = ["shape", "page cache", "took", "read", "locked layers", "written", "new files", "peak memory"]
    cells = []
    for row in every:
        for cache, seen in row["rows"].items() if row["kind"] == "watched" else ():
            sizes = [seen["read_bytes"], row["locked_bytes"], seen["write_bytes"], seen["new_bytes"]]
            line = [row["shape"], cache, _time(seen["seconds"]), *(f"{size / 1e6:.2f} MB" for size in sizes)]
            cells.append([*line, f"{seen['peak_bytes'] / 1e6:.0f} MB"])
    return [*lines, OF_WATCHING, "", *table(head, cells)] if cells else lines


def _locked(row: dict[str, Any]) -> list[str]:
    return [f"{row[key] / 1e6:.1f} MB" for key in ("locked_bytes", "column_bytes")]


def _pages(row: dict[str, Any]) -> str:
    if "pages" not in row:
        return "warm"
    least = min(row["huge"], key=lambda part: -1 if part is None else part)
    return f"{row['pages']} ({'not known' if least is None else f'{least:.0%} by 2 MiB'})"


def _ways(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    lines = []
    for way, row in rows.items():
        span, (ratio, least, most) = _span(row["seconds"]), row["ours_over_this"]
        over = "" if way == "relock_checkpoint" else f"{ratio:.3g} ({least:.3g}–{most:.3g})"
        lines.append([f"`{way}`", span, _time(row["fastest_seconds"]), str(row["rounds"]), over])
    return lines


def _timing(row: dict[str, Any], key: str, authors: float | None) -> list[str]:
    """Median and interval, GB/s, fraction of the copy, ratio to the authors' way."""
    if not row[key]:
        return [""] * 4
    rate = row["bytes"] / row[key][0]
    return [
        _span(row[key]),
        f"{rate / 1e9:.3g}",
        f"{rate / row['copy_bytes_per_second']:.0%}",
        _ratio(row, key, authors),
    ]


def _ratio(row: dict[str, Any], key: str, other: float | None) -> str:
    """The other's time over this row's, per model."""
    return f"{other * row['models'] / row[key][0]:.3g}×" if other else ""


def _per_model(rows: list[dict[str, Any]], shape: str, dtype: str, path: str, key: str) -> float | None:
    wanted = (shape, dtype, path, 1, False)
    found = [r[key] for r in rows if (r["shape"], r["dtype"], r["path"], r["models"], r["warm"]) == wanted]
    return float(found[0][0]) if found and found[0] else None


def _span(interval: list[float]) -> str:
    median, low, high = interval
    return f"{_time(median)} ({_time(low)}–{_time(high)})"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
