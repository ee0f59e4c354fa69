"""How the checkpoints on disk are told."""

from __future__ import annotations

from bench.lib.figures import span_text, time_text
from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.tables import table

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


def section(rows: Rows) -> list[str]:
    """The locks, what was timed, and what was watched."""
    lines = ["## Checkpoints on disk", "", OF_CHECKPOINTS, ""]
    locks = {row["shape"]: [row["shape"], row["lock"], *_locked(row)] for row in rows}
    lines += table(["shape", "lock", "locked layers", "locked columns"], list(locks.values()))
    head = ["shape", "page cache", "way", "median (95 %)", "fastest", "rounds", "relock over this (95 %)"]
    timed = [row for row in rows if row["kind"] in ("times", "loading")]
    lines += table(head, [[row["shape"], _pages(row), *line] for row in timed for line in _ways(row["rows"])])
    head = ["shape", "page cache", "took", "read", "locked layers", "written", "new files", "peak memory"]
    cells = []
    for row in rows:
        for cache, seen in row["rows"].items() if row["kind"] == "watched" else ():
            sizes = [seen["read_bytes"], row["locked_bytes"], seen["write_bytes"], seen["new_bytes"]]
            line = [row["shape"], cache, time_text(seen["seconds"]), *(f"{size / 1e6:.2f} MB" for size in sizes)]
            cells.append([*line, f"{seen['peak_bytes'] / 1e6:.0f} MB"])
    return [*lines, OF_WATCHING, "", *table(head, cells)] if cells else lines


def _locked(row: Row) -> list[str]:
    return [f"{row[key] / 1e6:.1f} MB" for key in ("locked_bytes", "column_bytes")]


def _pages(row: Row) -> str:
    if "pages" not in row:
        return "warm"
    least = min(row["huge"], key=lambda part: -1 if part is None else part)
    return f"{row['pages']} ({'not known' if least is None else f'{least:.0%} by 2 MiB'})"


def _ways(rows: dict[str, Row]) -> list[list[str]]:
    lines = []
    for way, row in rows.items():
        span, (ratio, least, most) = span_text(row["seconds"]), row["ours_over_this"]
        over = "" if way == "relock_checkpoint" else f"{ratio:.3g} ({least:.3g}–{most:.3g})"
        lines.append([f"`{way}`", span, time_text(row["fastest_seconds"]), str(row["rounds"]), over])
    return lines


REPORT = Report(section)
