"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, and the empty line after it."""
    return [*head_lines(columns), *map(row_line, rows), ""]


def head_lines(columns: Sequence[str]) -> list[str]:
    """The two lines that a table begins with."""
    return [row_line(columns), row_line(["---"] * len(columns))]


def row_line(cells: Sequence[str]) -> str:
    """One row."""
    return f"| {' | '.join(cells)} |"
