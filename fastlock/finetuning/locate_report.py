"""What `locate` found, on disk and for people: JSON, a page with the curve and the counts, and the band's file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastlock.finetuning.over_refusal import UNSCALED
from fastlock.finetuning.safety_layers import Located
from fastlock.html_page import Axis, facts_list, figure, head, html_text, label, mark, svg, table, x_axis, y_axis
from fastlock.locks.band_evidence import RangeCount, RangeTest
from fastlock.storage.files import write_atomic

BAND_FILE, JSON_FILE, PAGE_FILE = "band.json", "located.json", "located.html"
# Of the pictures, in their own units.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 300, 60, 20, 14, 40
_SHADE = "fill: var(--good); opacity: .14"


def write_report(directory: Path, found: Located, facts: dict[str, str]) -> None:
    """Write located.json, located.html and, if there is a band, band.json; each as a whole or not at all.

    An older band.json is removed where no band stands out.

    Raises:
        FastlockError: a file cannot be written.
    """
    data = json.dumps({**facts, **found.to_dict()}, indent=1, allow_nan=False)
    write_atomic(directory / JSON_FILE, (data + "\n").encode())
    write_atomic(directory / PAGE_FILE, report_html(found, facts).encode())
    if found.band is not None:
        found.band.save(directory / BAND_FILE)
    else:
        (directory / BAND_FILE).unlink(missing_ok=True)


def report_html(found: Located, facts: dict[str, str]) -> str:
    """The page: the finding, facts, the curve, the counts, and the tests."""
    evidence = found.evidence
    band = "none stands out" if found.band is None else f"layers {found.band.first} to {found.band.last}"
    named = {
        "model": found.base_model or "unnamed",
        "layers": str(found.num_layers),
        "band": band,
        "prompts": f"{evidence.normal} normal, {evidence.malicious} malicious, {evidence.borderline} borderline",
        "prompts digest": evidence.prompts,
        "judge": evidence.judge,
        "new tokens": str(evidence.new_tokens),
    }
    return "\n".join(
        [
            head("fastlock locate"),
            _STYLE,
            f"<h1>fastlock locate</h1><p>{html_text(evidence.reason[:1].upper() + evidence.reason[1:])}.</p>",
            facts_list({**named, **facts}),
            _angles(found),
            *_counts(found),
            *_tests(evidence.tests),
            "</body></html>",
        ]
    )


def count_rows(counts: Sequence[RangeCount]) -> list[tuple[str, ...]]:
    """The rows of a table of counts: layers, scale, refused, 95 % interval."""
    return [
        (
            _name(one.first, one.last),
            f"{one.scale:g}",
            f"{one.refused} of {one.judged}",
            f"{one.low:.0%} to {one.high:.0%}",
        )
        for one in counts
    ]


def _name(first: int, last: int) -> str:
    return "none" if (first, last) == UNSCALED else f"{first} to {last}"


def _angles(found: Located) -> str:
    curve = found.evidence.curve
    gaps = [*curve.gap, *curve.borderline_gap, *curve.separation, curve.threshold, 0.0]
    low, high = min(gaps), max(gaps)
    room = 0.06 * (high - low or 1)
    x = Axis(-0.5, found.num_layers - 0.5, _LEFT, _WIDTH - _RIGHT)
    y = Axis(low - room, high + room, _HEIGHT - _BOTTOM, _TOP)
    marks = [
        x_axis(x, _layer_ticks(found.num_layers), _TOP, _HEIGHT - _BOTTOM),
        y_axis(y, _degree_ticks(low, high), _LEFT, _WIDTH - _RIGHT),
        _shade(found, x),
        mark(
            "line",
            "99 of 100 shuffles stay below",
            kind="shuffles",
            x1=_LEFT,
            x2=_WIDTH - _RIGHT,
            y1=y(curve.threshold),
            y2=y(curve.threshold),
        ),
        *_line(curve.borderline_gap, x, y, "borderline"),
        *_line(curve.gap, x, y, "malicious"),
        *_line(curve.separation, x, y, "separation"),
        label("layer", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "middle"),
    ]
    caption = (
        "After each layer, how many degrees further apart mixed pairs of normal and malicious requests lie than pairs "
        "of one kind (green), and than normal pairs alone (blue: the paper's curve); red: normal pairs mixed with "
        "harmless requests that sound harmful. The green line stays below the dashed one in 99 of 100 shuffles of the "
        "kinds. Shaded: the band."
    )
    return figure("Angular gap", svg(_WIDTH, _HEIGHT, "Angular gap by layer", marks), caption)


def _counts(found: Located) -> Iterable[str]:
    """A picture for ranges with one first layer, one for those with one last layer, and the table of all."""
    counts = found.evidence.counts
    if not counts or found.evidence.first_range is None:
        return
    start = found.evidence.first_range[0]
    best = (found.band.first, found.band.last) if found.band is not None else _best_of(found)
    growing = [one for one in counts if one.first == start]
    shrinking = [one for one in counts if one.last == best[1]]
    scale = next(one.scale for one in counts if (one.first, one.last) != UNSCALED)
    baseline = next(one for one in counts if (one.first, one.last) == UNSCALED)
    captions = (
        f"Borderline requests refused with the layers scaled by {scale:g}, with 95 % intervals. Dashed: unscaled."
    )
    for title, chosen, ends in (
        (f"Layers {start} to …", growing, [one.last for one in growing]),
        (f"Layers … to {best[1]}", shrinking, [one.first for one in shrinking]),
    ):
        yield figure(title, _count_picture(found, title, chosen, ends, baseline), captions)
    yield "<h2>Counts</h2>"
    yield table(("layers scaled", "by", "refused", "95 % interval"), count_rows(counts))


def _best_of(found: Located) -> tuple[int, int]:
    """The best range where none stood out: the one that no test is against."""
    tested = {(one.first, one.last) for one in found.evidence.tests}
    return next((one.first, one.last) for one in found.evidence.counts if (one.first, one.last) not in tested)


def _count_picture(
    found: Located, title: str, counts: Sequence[RangeCount], ends: Sequence[int], baseline: RangeCount
) -> str:
    x = Axis(-0.5, found.num_layers - 0.5, _LEFT, _WIDTH - _RIGHT)
    highest = max(one.high for one in [*counts, baseline])
    y = Axis(0, highest * 1.05 or 1, _HEIGHT - _BOTTOM, _TOP)
    level = y(baseline.refused / max(baseline.judged, 1))
    marks = [
        x_axis(x, _layer_ticks(found.num_layers), _TOP, _HEIGHT - _BOTTOM),
        y_axis(y, _share_ticks(highest), _LEFT, _WIDTH - _RIGHT),
        _shade(found, x),
        mark("line", "unscaled", kind="shuffles", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=level, y2=level),
    ]
    for one, end in zip(counts, ends, strict=True):
        said = f"layers {_name(one.first, one.last)}: {one.refused} of {one.judged}"
        marks += [
            mark("line", said, kind="limits", x1=x(end), x2=x(end), y1=y(one.low), y2=y(one.high)),
            mark("circle", said, kind="bar", cx=x(end), cy=y(one.refused / max(one.judged, 1)), r=4.5),
        ]
    marks.append(
        label("last layer" if title.endswith("…") else "first layer", (_LEFT + _WIDTH) / 2, _HEIGHT - 8, "middle")
    )
    return svg(_WIDTH, _HEIGHT, title, marks)


def _tests(tests: Sequence[RangeTest]) -> Iterable[str]:
    if not tests:
        return
    yield "<h2>The best range against the others</h2>"
    yield (
        "<p class=soft>McNemar's exact test over the same requests, two-sided, uncorrected. A border whose neighbour "
        "has a large p lies within noise.</p>"
    )
    yield table(
        ("layers", "where", "only the best refuses", "only these refuse", "p"),
        [
            (
                _name(one.first, one.last),
                "unscaled" if (one.first, one.last) == UNSCALED else "elsewhere" if one.elsewhere else "overlapping",
                str(one.only_best),
                str(one.only_other),
                f"{one.p:.2g}",
            )
            for one in tests
        ],
    )


def _shade(found: Located, x: Axis) -> str:
    if found.band is None:
        return ""
    left, right = x(found.band.first - 0.5), x(found.band.last + 0.5)
    return mark("rect", "the band", style=_SHADE, x=left, y=_TOP, width=right - left, height=_HEIGHT - _BOTTOM - _TOP)


def _line(values: Sequence[float], x: Axis, y: Axis, kind: str) -> list[str]:
    points = " ".join(f"{x(layer):.1f},{y(value):.1f}" for layer, value in enumerate(values))
    dots = [
        mark("circle", f"layer {layer}: {value:.2f}°, {kind}", kind=f"dot {kind}", cx=x(layer), cy=y(value), r=3.0)
        for layer, value in enumerate(values)
    ]
    return [mark("polyline", kind=f"curve {kind}", points=points), *dots]


def _layer_ticks(num_layers: int) -> list[tuple[float, str]]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if num_layers / step <= 36)
    return [(layer, str(layer)) for layer in range(0, num_layers, step)]


def _share_ticks(highest: float) -> list[tuple[float, str]]:
    """Round shares from 0 to a number, at most six of them."""
    step = next(step for step in (1, 2, 5, 10, 20) if 100 * highest / step <= 5 or step == 20)
    return [(percent / 100, f"{percent}%") for percent in range(0, int(100 * highest) + 1, step)]


def _degree_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round degrees between two numbers, four to eight of them."""
    span = max(high - low, 1e-3)
    size = next(
        size for power in range(-5, 4) for size in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if span / size <= 8
    )
    first = int(-(-low // size))
    return [(number * size, f"{number * size:g}°") for number in range(first, int(high // size) + 1)]


_STYLE = """<style>
svg .curve { fill: none; stroke-width: 2.5 } svg .shuffles { stroke: var(--soft); stroke-dasharray: 5 4 }
svg .curve.malicious { stroke: var(--bar) } svg .dot.malicious { fill: var(--bar) }
svg .curve.borderline { stroke: var(--bad) } svg .dot.borderline { fill: var(--bad) }
svg .curve.separation { stroke: var(--good) } svg .dot.separation { fill: var(--good) }</style>"""
