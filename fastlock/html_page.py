"""What fastlock's HTML pages have in common: they need no network, run no script, and trust no name."""

from __future__ import annotations

import html

from fastlock.errors import shown

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #626b76; --line: #d9dee4; --page: #fff; --card: #f5f7f9;
  --good: #1f7a4d; --bar: #3d8fd1; --bad: #c2352b; --calm: #8a6d1a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --soft: #9aa4b0; --line: #333a43; --page: #14171b;
  --card: #1d2127; --good: #5cc48d; --bar: #5aa9e6; --bad: #ff7b70; --calm: #d9b64c; } }
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
svg text { fill: var(--soft); font-size: 12px } svg .grid { stroke: var(--line) } svg .bar { fill: var(--bar) }
svg .bad { fill: var(--bad) }
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
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{STYLE}</style></head><body>"
    )


def facts_list(facts: dict[str, str]) -> str:
    """Names and values, as a list."""
    rows = "".join(f"<dt>{html_text(key)}</dt><dd>{html_text(value)}</dd>" for key, value in facts.items())
    return f"<dl>{rows}</dl>"


def html_text(text: str) -> str:
    """A name from outside, fit to be put into a page."""
    return html.escape(shown(text))
