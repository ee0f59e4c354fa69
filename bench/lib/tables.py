"""Markdown tables."""

from __future__ import annotations


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, and the empty line after it."""
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows), ""]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
