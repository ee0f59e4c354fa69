"""The picture of what the fold reaches: bytes a second against bytes in a call, under the roofs of the same run."""

from __future__ import annotations

import html
import math
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 440, 64, 16, 150, 48
COLOURS = {
    "launch": "#1f7a4d",
    "plan": "#3d8fd1",
    "plan of models": "#8a5fbf",
    "relock": "#c77d0a",
    "columns": "#8c8c8c",
    "linear": "#c2352b",
    "authors": "#5b3a29",
}


def picture(rows: list[dict[str, Any]]) -> str | None:
    """An SVG of the cold bfloat16 rows (and the authors' float16), or None if there are none."""
    rows = [row for row in rows if row["path"] in COLOURS and not row["warm"] and _is_shown(row)]
    if not rows:
        return None
    points = [(row["bytes"], row["bytes"] / _seconds(row), row) for row in rows]
    copy, empty = rows[0]["copy_bytes_per_second"], rows[0]["empty_launch_seconds"]
    sizes = [size for size, _, _ in points] + ([] if empty is None else [copy * empty / 2])  # where the roofs meet
    x_low, x_high = math.floor(math.log10(min(sizes)) * 2) / 2, math.ceil(math.log10(max(sizes)) * 2) / 2
    y_low = math.floor(min(math.log10(y) for _, y, _ in points))
    y_high = math.log10(max(copy, *(y for _, y, _ in points))) + 0.1

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (y_high - math.log10(value)) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [*_grid(x, y, (x_low, x_high), (y_low, y_high)), *_roofs(x, y, copy, empty, (x_low, x_high), y_low)]
    for name, colour in COLOURS.items():
        for shape in dict.fromkeys(row["shape"] for _, _, row in points):
            mine = sorted(
                (p for p in points if (p[2]["path"], p[2]["shape"]) == (name, shape)), key=lambda point: point[0]
            )
            line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in mine)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += [_dot(x(a), y(b), colour, row) for a, b, row in mine]
    parts += _legend([name for name in COLOURS if any(row["path"] == name for row in rows)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _is_shown(row: dict[str, Any]) -> bool:
    return bool(row["dtype"] == ("float16" if row["path"] == "authors" else "bfloat16"))


def _seconds(row: dict[str, Any]) -> float:
    """On the device, where that was measured."""
    return float((row["device_seconds"] or row["seconds"])[0])


def _grid(x: Any, y: Any, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for i in range(math.ceil(xs[0]), math.floor(xs[1]) + 1):
        for value in (10**i, 3 * 10**i):
            if value <= 10 ** xs[1]:
                parts.append(f'<path d="M{x(value):.1f} {TOP}V{bottom}" stroke="#ddd"/>')
                parts.append(_text(x(value), bottom + 18, _size(value), "middle"))
    for i in range(math.ceil(ys[0]), math.floor(ys[1]) + 1):
        for value in (10**i, 3 * 10**i):
            if value <= 10 ** ys[1]:
                parts.append(f'<path d="M{LEFT} {y(value):.1f}H{right}" stroke="#ddd"/>')
                parts.append(_text(LEFT - 6, y(value) + 4, f"{value / 1e9:g}", "end"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, "bytes counted in a call", "middle"))
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle" fill="#555">GB/s</text>'
    )
    return parts


def _roofs(x: Any, y: Any, copy: float, empty: float | None, xs: tuple[float, float], y_low: float) -> list[str]:
    """The copy bandwidth; and, below the size at which it takes as long as an empty launch, the launch."""
    left, right = 10 ** xs[0], 10 ** xs[1]
    corner = left if empty is None else min(max(left, copy * empty), right)
    path = f"M{x(corner):.1f} {y(copy):.1f}H{x(right):.1f}"
    if empty is not None and corner > left:
        start = max(left, 10**y_low * empty)
        path += f"M{x(start):.1f} {y(start / empty):.1f}L{x(corner):.1f} {y(corner / empty):.1f}"
    label = _text(WIDTH - RIGHT + 6, y(copy) + 4, f"copy: {copy / 1e9:,.0f} GB/s", "start")
    return [f'<path d="{path}" stroke="#222" stroke-width="1.5" stroke-dasharray="5 3" fill="none"/>', label]


def _dot(x: float, y: float, colour: str, row: dict[str, Any]) -> str:
    rate = row["bytes"] / _seconds(row) / 1e9
    what = f"{row['path']}, {row['shape']}, {row['models']} models a call: {rate:.3g} GB/s"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if row["shape"] == "8B" else 6}" fill="{colour}" '
        f'fill-opacity=".85"><title>{html.escape(what)}</title></circle>'
    )


def _legend(names: list[str]) -> list[str]:
    parts = [_text(WIDTH - RIGHT + 12, TOP + 150, "small: 8B, large: 70B", "start")]
    for i, name in enumerate(names):
        top = TOP + 180 + 20 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{top - 4}" r="5" fill="{COLOURS[name]}"/>')
        parts.append(_text(WIDTH - RIGHT + 30, top, name, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#555">{html.escape(text)}</text>'


def _size(value: float) -> str:
    return f"{value / 1e6:g} MB" if value < 1e9 else f"{value / 1e9:g} GB"
