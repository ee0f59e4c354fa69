"""How parity is told: per kind of test the cases, and the worst of them."""

from __future__ import annotations

from bench.lib.report import Report, Rows
from bench.lib.tables import table

NOTE = "Largest error against float64 in units of `reference.error_bound`: right if at most 1."


def section(rows: Rows) -> list[str]:
    """A line for each kind of test."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        groups.setdefault(row["what"], []).append((row["error_in_bounds"], row["case"]))
    cells = [[what, str(len(cases)), f"{max(cases)[0]:.2f}", max(cases)[1]] for what, cases in groups.items()]
    return ["## Parity on the device", "", NOTE, "", *table(["what", "cases", "largest error", "where"], cells)]


def headline(rows: Rows) -> list[str]:
    """The worst of all."""
    worst = max(rows, key=lambda row: row["error_in_bounds"])
    return [f"parity: {worst['error_in_bounds']:.2f} of the bound at most ({worst['what']}, {worst['case']})"]


REPORT = Report(section, headline=headline)
