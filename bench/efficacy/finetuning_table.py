"""The table of finetuning.py, from its journal alone."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence

from bench.lib.figures import interval_of_mean
from bench.lib.journal import Record

COLUMNS = (
    "harmful rows",
    "seeds",
    "method",
    "lock's strength",
    "refuses harmful",
    "refuses harmless",
    "task",
    "perplexity",
    "CPU time of training, over plain's",
    "bytes held in training, over plain's",
)
RATES = ("refused", "over_refused", "right")
PLAIN = "plain"


def comparable(records: Sequence[Record], methods: int) -> list[Record]:
    """The cells of those seeds and shares that have all methods: the rows of a share are then of the same seeds."""
    counts = collections.Counter((record["seed"], record["share"]) for record in records)
    return [record for record in records if counts[record["seed"], record["share"]] == methods]


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """Two rows for each share and method, without and with a lock, in the order in which they were first done."""
    groups: dict[tuple[float, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["share"], record["method"]), []).append(record)
    rows = []
    for (share, method), cells in groups.items():
        plain = {record["seed"]: record for record in groups.get((share, PLAIN), [])}
        pairs = [(cell, plain[cell["seed"]]) for cell in cells if cell["seed"] in plain]
        begin = [f"{share:.0%}", str(len(cells)), method]
        rows.append([*begin, "none", *_measured([cell["without"] for cell in cells]), *_costs(pairs)])
        strengths = ", ".join(f"{cell['strength']:g}" for cell in cells)
        rows.append([*begin, strengths, *_measured([cell["with"] for cell in cells]), "", ""])
    return rows


def rate(cells: Sequence[Record], name: str) -> str:
    """Counts over all seeds, and the mean share of the seeds with half its 95 % interval."""
    hits, of = (sum(count(cell[name]) for cell in cells) for count in (sum, len))
    return f"{hits} of {of}: {_with_interval([100 * statistics.fmean(cell[name]) for cell in cells], '.1f')} %"


def _measured(cells: Sequence[Record]) -> list[str]:
    perplexity = _with_interval([cell["perplexity"] for cell in cells], ".1f")
    return [*(rate(cells, name) for name in RATES), perplexity]


def _costs(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """Of cells beside the plain one of the same seed."""
    if not pairs:
        return ["", ""]
    seconds = _with_interval([cell["seconds"] / plain["seconds"] for cell, plain in pairs], ".2f")
    more = statistics.fmean(cell["state_bytes"] - plain["state_bytes"] for cell, plain in pairs)
    return [seconds, f"{more / 1e6:+.1f} MB"]


def _with_interval(values: Sequence[float], form: str) -> str:
    mean, half = interval_of_mean(values)
    return f"{mean:{form}}" + (f" ± {half:{form}}" if not math.isnan(half) else "")
