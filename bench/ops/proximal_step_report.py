"""How the optimizer's step is told."""

from __future__ import annotations

from bench.lib.figures import span_text
from bench.lib.recording import Row
from bench.lib.report import Report, Rows
from bench.lib.tables import table

HOW_TO_READ = """\
Random numbers in tensors of the shape of Llama-3 8B, on a CPU an eighth as wide and high: all-linear adapters
(**LoRA**), or whole **layers**. No model was downloaded.

- **pull**, **no pull**: `fastlock.ProximalAdamW` with an anchor and without; **pull, clipped**: with `max_grad_norm`,
  which takes one more pass over gradients, weights and anchors; **fused**: `torch.optim.AdamW(fused=True)`, without a
  term; **fused + foreach**: the same, after two foreach operations that add the term to the gradients.
- **median**: of one step; on a GPU between two events, with everything queued before the device starts; in brackets the
  95 % interval of the median (order statistics). The ways take turns. **over pull**: the median of the ratios to `pull`
  of the same round. **host**: of the call by the host's clock, nothing waited for (on a CPU it is the step itself).
- **B/parameter**: bytes that the way must move for each parameter, read and written once each. **of copy**: these bytes
  over the median, over the bandwidth of a large `copy_` (read plus written) measured just before on the same device.
- **error**: the largest of four tensors against float64, of a step after the timed ones: one unit in the last place of
  what is kept, and the bound of float32. Ours is held to 1; torch's bfloat16 optimizer rounds more often."""
PEERS = ("fused", "fused + foreach")
AIMS = "aims: 88% of the copy or more; 1.15 x fused or less; 0.71 x fused + foreach or less"


def section(rows: Rows) -> list[str]:
    """How to read it, and a table for each shape and dtype."""
    lines = ["## The optimizer's step", "", HOW_TO_READ, ""]
    head = ["way", "median (95 %)", "over pull (95 %)", "B/parameter", "of copy", "host", "error"]
    for row in rows:
        lines += [f"### {_what(row)}, {row['device']}", ""]
        lines += [
            f"{row['tensors']} tensors, {row['parameters'] / 1e6:.4g} million parameters; {row['rounds']} rounds.",
            "",
        ]
        lines += table(head, [_cells(row, name) for name in row["ways"]])
    return lines


def headline(rows: Rows) -> list[str]:
    """What each aim comes to, on a GPU: a CPU has neither its kernels nor its copy."""
    on_gpu = [row for row in rows if row["device"].startswith("cuda")]
    if not on_gpu:
        return []
    parts = []
    for row in on_gpu:
        figures = [f"{_of_copy(row, 'pull'):.0%}"]
        figures += [f"{1 / row['ways'][name]['ratio'][0]:.2f} x" for name in PEERS if name in row["ways"]]
        parts.append(f"{row['shape']}, {row['weight']}/{row['state']}: {', '.join(figures)}")
    return [f"optimizer's step with a pull ({AIMS}): {'; '.join(parts)}"]


def _what(row: Row) -> str:
    return f"{row['shape']}, {row['weight']} with {row['state']} moments"


def _cells(row: Row, name: str) -> list[str]:
    way = row["ways"][name]
    ratio, least, most = way["ratio"]
    over = "" if name == "pull" else f"{ratio:.3g} ({least:.3g}–{most:.3g})"
    cells = [f"`{name}`", span_text(way["seconds"]), over, f"{way['bytes'] / row['parameters']:.3g}"]
    return [*cells, f"{_of_copy(row, name):.0%}", span_text(way["host_seconds"]), f"{way['error']:.2g}"]


def _of_copy(row: Row, name: str) -> float:
    way = row["ways"][name]
    return float(way["bytes"] / way["seconds"][0] / row["copy_bytes_per_second"])


REPORT = Report(section, headline=headline)
