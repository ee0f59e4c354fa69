"""Markdown that a script prints as it goes, and leaves for run.py's report."""

from __future__ import annotations

from collections.abc import Sequence

from bench.lib.recording import record_row
from bench.lib.tables import head_lines, row_line


def say(text: str) -> None:
    """A paragraph."""
    print(f"\n{text}", flush=True)
    record_row({"text": text})


class PrintedTable:
    """A table, of which each row is printed once it is known."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        print("\n".join(["", *head_lines(columns)]), flush=True)

    def row(self, *cells: str) -> None:
        """The next row."""
        print(row_line(cells), flush=True)
        record_row({"columns": self.columns, "cells": list(cells)})
