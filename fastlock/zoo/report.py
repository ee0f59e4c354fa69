"""The page that says what became of a zoo: one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone

from fastlock.html_page import Axis, facts_list, figure, group, head, html_text, label, mark, svg, y_axis
from fastlock.version import __version__
from fastlock.zoo.find import ADAPTER, CHECKPOINT, GGUF
from fastlock.zoo.tasks import DONE_ALREADY, FAILED, RELOCKED, SKIPPED, Result

MAX_ROWS = 2000
BINS = 80
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 960, 200, 56, 12, 40, 26
ORDER = (RELOCKED, DONE_ALREADY, SKIPPED, FAILED)
KINDS = {CHECKPOINT: "checkpoints", ADAPTER: "adapters", GGUF: "GGUF models"}


def report_page(results: Sequence[Result], total: int, seconds: float, facts: dict[str, str]) -> str:
    """The page, as HTML.

    Args:
        results: what became of each checkpoint that was finished.
        total: how many there are in all.
        seconds: how long it took.
        facts: what else to say at the top.
    """
    failed = [result for result in results if result.status == FAILED]
    left = total - len(results)
    found = {result.kind for result in results}
    *others, last = [name for kind, name in KINDS.items() if kind in found] or ["checkpoints"]
    what = f"{', '.join(others)} and {last}" if others else last
    stopped = f"<p class=warning>Stopped early: {left:,} of {total:,} {what} are not done. Run it again.</p>"
    return "\n".join(
        [
            head(f"fastlock zoo: {len(results):,} {what}"),
            f"<h1>fastlock zoo: {total:,} {what}</h1>",
            stopped if left else "",
            _facts(results, seconds, facts),
            _tiles(results, seconds),
            _throughput(results) if any(result.status == RELOCKED for result in results) else "",
            _table("Failures", failed) if failed else "",
            _table(f"All {what}", sorted(results, key=lambda result: result.name)),
            "</body></html>",
        ]
    )


def _facts(results: Sequence[Result], seconds: float, facts: dict[str, str]) -> str:
    ended = datetime.fromtimestamp(max((result.time for result in results), default=0), timezone.utc)
    when = f"{ended:%Y-%m-%d %H:%M:%S} UTC, after {_duration(seconds)}" if results else "nothing is done"
    return facts_list({**facts, "ended": when, "fastlock": __version__})


def _tiles(results: Sequence[Result], seconds: float) -> str:
    counts = Counter(result.status for result in results)
    tiles = [(f"{counts[status]:,}", status, status if counts[status] else "") for status in ORDER]
    if counts[RELOCKED] and seconds:
        tiles.append((_rate(counts[RELOCKED] / seconds), "relocked a second", ""))
        moved = [(r.bytes_read, r.bytes_written) for r in results if r.bytes_read is not None]
        if moved:
            read, written = (sum(amount or 0 for amount in column) for column in zip(*moved, strict=True))
            tiles.append((_bytes(read), "read", ""))
            tiles.append((_bytes(written), "written", ""))
    body = "".join(f'<div class=tile><b class="{kind}">{value}</b>{label}</div>' for value, label, kind in tiles)
    return f"<div class=tiles>{body}</div>"


def _throughput(results: Sequence[Result]) -> str:
    """Checkpoints relocked per second over time, and below them when others failed."""
    span, done, failed = _histogram(results)
    step = span / BINS
    top = _round_up(max(done.values()) / step)
    x, y = Axis(0, span, LEFT, WIDTH - RIGHT), Axis(0, top, HEIGHT - BOTTOM, TOP)
    marks = [
        y_axis(y, [(tick * top, f"{tick * top:g}") for tick in (0, 0.5, 1)], LEFT, WIDTH - RIGHT),
        *(label(_duration(tick * span), x(tick * span), HEIGHT - 8, "middle") for tick in (0, 0.5, 1)),
    ]
    for place in sorted({*done, *failed}):
        column = {"x": x(place * step) + 0.5, "width": x(step) - LEFT - 1}
        height = y(0) - y(done[place] / step)
        bars = [mark("rect", "", kind="bar", **column, y=y(0) - height, height=height)]
        if failed[place]:
            bars.append(mark("rect", "", kind="bad", **column, y=y(0) + 1, height=5))
        marks.append(group(f"{_duration(place * step)}: {done[place]} relocked, {failed[place]} failed", bars))
    legend = "; red below the axis: when checkpoints failed" if failed else ""
    caption = "Checkpoints relocked per second, over time"
    return figure("Throughput", svg(WIDTH, HEIGHT, caption, marks), caption + legend)


def _histogram(results: Sequence[Result]) -> tuple[float, Counter[int], Counter[int]]:
    """How long it took, in seconds; and how many checkpoints were relocked and failed in each of `BINS` parts of it."""
    first = min(result.time - result.seconds for result in results)
    span = max(max(result.time for result in results) - first, 1e-3)
    counts = {RELOCKED: Counter[int](), FAILED: Counter[int]()}
    for result in results:
        if result.status in counts:
            counts[result.status][min(int((result.time - first) / span * BINS), BINS - 1)] += 1
    return span, counts[RELOCKED], counts[FAILED]


def _table(title: str, results: Sequence[Result]) -> str:
    kept = results[:MAX_ROWS]
    note = f"<p class=soft>The first {MAX_ROWS:,} of {len(results):,}; the log beside this page has all.</p>"
    return (
        f"<h2>{title}</h2>{note if len(kept) < len(results) else ''}<div class=scroll><table><thead><tr><th>name"
        "<th>status<th class=number>seconds<th class=number>read<th class=number>written<th>reason</thead><tbody>"
        + "\n".join(map(_row, kept))
        + "</tbody></table></div>"
    )


def _row(result: Result) -> str:
    read, written = ("" if moved is None else _bytes(moved) for moved in (result.bytes_read, result.bytes_written))
    kind, status = result.status.replace(" ", "-"), result.status + (f" ({result.carrier})" if result.carrier else "")
    return (
        f'<tr><td class=name title="{html_text(result.source)}">{html_text(result.name)}'
        f'<td class="status {html_text(kind)}">{html_text(status)}<td class=number>{result.seconds:.3f}'
        f"<td class=number>{read}<td class=number>{written}<td class=reason>{html_text(result.error)}"
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{_rate(count)} TB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10, 20, … from a value on: numbers whose halves are round too."""
    scale = 1e-9
    while True:
        for step in (1, 2, 4, 6, 8):
            if value <= step * scale * (1 + 1e-9):
                return float(f"{step * scale:.1g}")
        scale *= 10
