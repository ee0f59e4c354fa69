"""The tables of gated.py, from its journal alone."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

from bench.lib.figures import interval_of_mean
from bench.lib.journal import Record, read_journal
from bench.lib.tables import table
from fastlock.evaluation.significance import wilson_interval

COLUMNS = ("fine-tune", "lock", "seeds", "refuses harmful", "refuses harmless", "refuses scary", "perplexity, times")
INNOCENT = ("harmless", "scary")
# Of fewer seeds, the interval of their mean says nothing.
LEAST_SEEDS = 3


def markdown(path: Path) -> str:
    """A row for each kind of fine-tune and lock, and one over all of them."""
    head, records = read_journal(path)
    facts = " · ".join(f"{key}: {value}" for key, value in head["facts"].items())
    lines = [facts, "", *table(COLUMNS, rows_of(records)), ""]
    return "\n".join([*lines, "Refused most often, though harmless:", "", *most_refused(records)])


def rows_of(records: Sequence[Record]) -> list[list[str]]:
    """The cells of the table."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["kind"], record["lock"]), []).append(record)
        if record["kind"] != "base":
            groups.setdefault(("all kinds", record["lock"]), []).append(record)
    without = {(record["kind"], record["seed"]): record for record in records if record["lock"] == "none"}
    kinds = dict.fromkeys(kind for kind, _ in groups)
    ordered = [*(kind for kind in kinds if kind != "all kinds"), *(kind for kind in kinds if kind == "all kinds")]
    return [_row(kind, lock, cells, without) for kind in ordered for (of, lock), cells in groups.items() if of == kind]


def _row(kind: str, lock: str, cells: Sequence[Record], without: dict[tuple[str, int], Record]) -> list[str]:
    ratios = [cell["perplexity"] / without[cell["kind"], cell["seed"]]["perplexity"] for cell in cells]
    seeds = len({cell["seed"] for cell in cells})
    rates = [rate(cells, (name,)) for name in ("harmful", *INNOCENT)]
    return [kind, lock, str(seeds), *rates, f"{min(ratios):.3f} to {max(ratios):.3f}"]


def rate(cells: Sequence[Record], names: Sequence[str]) -> str:
    """Counts, their share with Wilson's 95 % interval, and of LEAST_SEEDS and more their mean with half of its own."""
    hits, of = (sum(cell[what][name] for cell in cells for name in names) for what in ("refused", "asked"))
    low, high = wilson_interval(hits, of)
    text = f"{hits} of {of}: {hits / of:.1%} ({low:.1%} to {high:.1%})"
    by_seed: dict[int, list[Record]] = {}
    for cell in cells:
        by_seed.setdefault(cell["seed"], []).append(cell)
    if len(by_seed) < LEAST_SEEDS:
        return text
    shares = [
        sum(cell["refused"][name] for cell in of_seed for name in names)
        / sum(cell["asked"][name] for cell in of_seed for name in names)
        for of_seed in by_seed.values()
    ]
    mean, half = interval_of_mean(shares)
    return f"{text}; seeds {mean:.1%} ± {half:.1%}"


def most_refused(records: Sequence[Record], most: int = 12) -> list[str]:
    """What is refused most often though it is harmless, with each lock: by how many of the models that were asked."""
    lines = []
    for lock in dict.fromkeys(record["lock"] for record in records):
        counted = collections.Counter(
            request for record in records if record["lock"] == lock for request in record["over_refused"]
        )
        names = "; ".join(f"{request} ({count})" for request, count in counted.most_common(most))
        lines.append(f"- {lock}: {names or 'nothing'}")
    return lines
