"""What fastlock's HTML pages and pictures share: they need no network, run no script, and trust no name."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastlock.errors import shown

_LIGHT = {
    **{"text": "#1b1f24", "soft": "#626b76", "line": "#d9dee4", "page": "#fff", "card": "#f5f7f9"},
    **{"good": "#1f7a4d", "bar": "#3d8fd1", "bad": "#c2352b", "calm": "#8a6d1a"},
}
_DARK = {
    **{"text": "#e6e9ed", "soft": "#9aa4b0", "line": "#333a43", "page": "#14171b", "card": "#1d2127"},
    **{"good": "#5cc48d", "bar": "#5aa9e6", "bad": "#ff7b70", "calm": "#d9b64c"},
}

_PICTURE_STYLE = """
svg { font: 12px system-ui, sans-serif } svg text { fill: var(--soft) } svg .value { fill: var(--text) }
svg .grid { stroke: var(--line) } svg .limits { stroke: var(--text); stroke-width: 2 }
svg .bar { fill: var(--bar) } svg .bad { fill: var(--bad) }
svg .frontier { fill: none; stroke: var(--soft) } svg .chosen { fill: none; stroke: var(--good); stroke-width: 2.5 }
"""

_PAGE_STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p, dd { margin: .2rem 0 } .soft, dt, figcaption { color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .8rem 0 0 }
dd { font-family: ui-monospace, monospace; font-size: .88rem; overflow-wrap: anywhere; margin: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.4rem 0 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums }
figure { margin: 0 } svg { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem }
table { border-collapse: collapse; width: 100%; font-size: .88rem }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line) }
thead th { border-top: 0; background: var(--card); white-space: nowrap } td { overflow-wrap: anywhere; min-width: 6rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; min-width: 0 }
td.reason { min-width: 20rem }
td.status { white-space: nowrap } td.name { min-width: 12rem; font-family: ui-monospace, monospace }
.failed, .warning { color: var(--bad); font-weight: 600 }
.skipped { color: var(--calm) } .relocked { color: var(--good) }
"""


def head(title: str) -> str:
    """A page up to its body."""
    light, dark = (
        f":root {{ {'; '.join(f'--{name}: {colour}' for name, colour in colours.items())} }}"
        for colours in (_LIGHT, _DARK)
    )
    colours = f":root {{ color-scheme: light dark }} {light}\n@media (prefers-color-scheme: dark) {{ {dark} }}"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{colours}{_PAGE_STYLE}{_PICTURE_STYLE}</style></head><body>"
    )


def facts_list(facts: dict[str, str]) -> str:
    """Names and values, as a list."""
    rows = "".join(f"<dt>{html_text(key)}</dt><dd>{html_text(value)}</dd>" for key, value in facts.items())
    return f"<dl>{rows}</dl>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, which scrolls where it is too wide."""
    return table_of(
        "".join(f"<th>{html_text(name)}" for name in header),
        "".join("<tr>" + "".join(f"<td>{html_text(cell)}" for cell in row) for row in rows),
    )


def table_of(header: str, rows: str) -> str:
    """A table of cells that are HTML already, which scrolls where it is too wide."""
    return f"<div class=scroll><table><thead><tr>{header}</thead><tbody>{rows}</tbody></table></div>"


def figure(title: str, picture: str, caption: str) -> str:
    """A picture under its title and above its caption."""
    return f"<h2>{html_text(title)}</h2><figure>{picture}<figcaption>{html_text(caption)}</figcaption></figure>"


def html_text(text: str) -> str:
    """A name from outside, fit to be put into a page."""
    return html.escape(shown(text))


# Pictures. A picture is made of marks, SVG elements at places that axes give; its colours are those of the page.


@dataclass(frozen=True)
class Axis:
    """Numbers along one side of a picture: `low` is drawn at `start`, `high` at `end`, the others evenly between."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a number is drawn."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def svg(width: float, height: float, label: str, marks: Iterable[str], *, alone: bool = False) -> str:
    """A picture. One that stands `alone`, in a file of its own, brings its light colours along.

    Args:
        width, height: in the units of its marks; it is scaled to the width of the page.
        label: what it shows, for those who cannot see it.
        marks: see `mark`; the later ones cover the earlier ones.
        alone: whether it is to be a file.
    """
    style = re.sub(r"var\(--(\w+)\)", lambda name: _LIGHT[name[1]], _PICTURE_STYLE)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{html_text(label)}">{f"<style>{style}</style>" if alone else ""}{"".join(marks)}</svg>'
    )


def mark(name: str, title: str = "", **attributes: str | float) -> str:
    """An SVG element.

    Args:
        name: "rect", "line", "circle", …
        title: what is shown while the pointer rests on it.
        attributes: its own, with "_" for "-", and `kind` for its class; numbers get one decimal.
    """
    return _element(name, attributes, _title(title))


def label(text: str, x: float, y: float, anchor: str = "start", **attributes: str | float) -> str:
    """A text that starts, is centred or ends (`anchor`) at x, with y in the middle of its height."""
    return _element("text", {"x": x, "y": y + 4, "text_anchor": anchor, **attributes}, html_text(text))


def group(title: str, marks: Iterable[str]) -> str:
    """Marks that have one title."""
    return f"<g>{_title(title)}{''.join(marks)}</g>"


def x_axis(axis: Axis, ticks: Iterable[tuple[float, str]], top: float, bottom: float) -> str:
    """A grid line from `top` to `bottom` for each tick, a number and its name, with the name below."""
    return "".join(
        mark("line", kind="grid", x1=axis(value), x2=axis(value), y1=top, y2=bottom)
        + label(name, axis(value), bottom + 13, "middle")
        for value, name in ticks
    )


def y_axis(axis: Axis, ticks: Iterable[tuple[float, str]], left: float, right: float) -> str:
    """A grid line from `left` to `right` for each tick, a number and its name, with the name before it."""
    return "".join(
        mark("line", kind="grid", x1=left, x2=right, y1=axis(value), y2=axis(value))
        + label(name, left - 8, axis(value), "end")
        for value, name in ticks
    )


def _element(name: str, attributes: Mapping[str, str | float], content: str) -> str:
    texts = {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in attributes.items()}
    written = "".join(
        f' {"class" if key == "kind" else key.replace("_", "-")}="{html_text(text)}"' for key, text in texts.items()
    )
    return f"<{name}{written}>{content}</{name}>"


def _title(text: str) -> str:
    return f"<title>{html_text(text)}</title>" if text else ""
