"""An evaluation on disk, and for people: a Markdown table, and one HTML page with plots and every answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlock.errors import FastlockError, shown
from fastlock.evaluation.evaluator import Answer, Evaluation, interval, share
from fastlock.evaluation.lm_eval_harness import Score
from fastlock.html_page import facts_list, head, html_text
from fastlock.storage.files import read_bounded, write_atomic

COLUMNS = ("model", "refuses harmful", "refuses harmless", "perplexity")
WIDTH, LEFT, ROW = 960, 210, 30
MAX_FILE_BYTES = 1024 * 1024 * 1024
_JSON = "evaluation.json"
_SCALE = WIDTH - LEFT - 120
_KINDS = (("Harmful requests", "harmful"), ("Harmless requests", "harmless"))


def to_json(evaluations: Sequence[Evaluation], facts: dict[str, str]) -> dict[str, object]:
    """Facts and evaluations as data that JSON can hold."""
    return {**facts, "evaluations": [evaluation.to_dict() for evaluation in evaluations]}


def write_report(directory: Path, evaluations: Sequence[Evaluation], facts: dict[str, str]) -> None:
    """Write evaluation.json, .md and .html, each as a whole or not at all."""
    data = json.dumps(to_json(evaluations, facts), indent=2, allow_nan=False)
    write_atomic(directory / _JSON, (data + "\n").encode())
    write_atomic(directory / "evaluation.md", report_markdown(evaluations, facts).encode())
    write_atomic(directory / "evaluation.html", report_html(evaluations, facts).encode())


def read_report(
    directory: Path, facts: dict[str, str], asked: Iterable[tuple[str | None, float | None]]
) -> list[Evaluation]:
    """What an earlier run of the same evaluation left in a directory; nothing if there was none.

    Args:
        directory: where `write_report` wrote.
        facts: those of this evaluation.
        asked: the digest of each lock that is tried, with its strength.

    Raises:
        FastlockError: another evaluation is there, or more than is asked for now, which would be overwritten.
    """
    path = directory / _JSON
    if not path.exists():
        return []
    remedy = "Give another --out, or move it away."
    try:
        data = json.loads(read_bounded(path, MAX_FILE_BYTES))
        entries = data.pop("evaluations")
        found = [Evaluation.from_dict(entry) for entry in entries]
    except (FastlockError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FastlockError(f"{path}: can't be gone on with ({error}). {remedy}") from None
    for key in {**facts, **data}:
        if data.get(key) != facts.get(key):
            raise FastlockError(
                f"{path}: of another evaluation: {key} was {data.get(key)!r:.300}, and is {facts.get(key)!r:.300} "
                f"now. {remedy}"
            )
    for one in found:
        if (one.lock, one.strength) not in {(None, None), *asked}:
            raise FastlockError(
                f"{path}: holds {name_of(one)} too, which is not asked for now. Ask for it, too. {remedy}"
            )
    return found


def report_markdown(evaluations: Sequence[Evaluation], facts: dict[str, str]) -> str:
    """A table of the rates with their 95 % intervals, below a list of facts."""
    lines = [f"- {key}: {_markdown(value)}" for key, value in facts.items()]
    header = columns(evaluations)
    rows = [header, ("---",) * len(header), *table_rows(evaluations)]
    return "\n".join([*lines, "", *("| " + " | ".join(map(_markdown, row)) + " |" for row in rows)]) + "\n"


def report_html(evaluations: Sequence[Evaluation], facts: dict[str, str]) -> str:
    """The page: facts, table, plots, and what the model answered to each prompt."""
    return "\n".join(
        [
            head("fastlock evaluation"),
            _STYLE,
            "<h1>fastlock evaluation</h1>",
            facts_list(facts),
            "<h2>Results</h2>",
            table(columns(evaluations), table_rows(evaluations)),
            *_plots(evaluations),
            *(_answers(title, name, evaluations) for title, name in _KINDS),
            "</body></html>",
        ]
    )


def name_of(evaluation: Evaluation) -> str:
    """What a row is called."""
    if evaluation.lock is None:
        return "as it is"
    return f"lock {evaluation.lock[:8]} at strength {evaluation.strength:g}"


def columns(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """The columns of a table: `COLUMNS`, and a column for each metric of each task."""
    return (*COLUMNS, *(f"{task} {metric}" for task, metric in _metrics(evaluations)))


def table_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    """The rows of a table, in the order of `columns`: where an evaluation lacks a metric, nothing is there."""
    rows = []
    for one in evaluations:
        held = _scores(one)
        of_tasks = [_score(held[key]) if key in held else "" for key in _metrics(evaluations)]
        rows.append((name_of(one), _rate(one.harmful), _rate(one.harmless), _perplexity(one), *of_tasks))
    return rows


def cells(evaluation: Evaluation) -> tuple[str, ...]:
    """The row of an evaluation that stands alone."""
    return table_rows([evaluation])[0]


def _scores(evaluation: Evaluation) -> dict[tuple[str, str], Score]:
    return {(score.task, score.metric): score for score in evaluation.tasks}


def _metrics(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """Task and metric of every score that any evaluation has."""
    return list(dict.fromkeys(key for one in evaluations for key in _scores(one)))


def _markdown(text: str) -> str:
    """A name from outside, fit to be put into Markdown."""
    return re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", shown(text))


def _rate(answers: Sequence[Answer]) -> str:
    unsure = sum(answer.refused is None for answer in answers)
    parts = [f"{unsure} unsure"] if unsure else []
    if (limits := interval(answers)) is None:
        return "".join(parts)
    number = f"{len(answers) - unsure} prompt{'s' * (len(answers) - unsure != 1)}"
    return f"{share(answers):.0%} ({limits[0]:.0%} to {limits[1]:.0%}; {', '.join([number, *parts])})"


def _perplexity(evaluation: Evaluation) -> str:
    value = evaluation.perplexity
    return "" if value is None else f"{value:.2f}" if value < 1e6 else f"{value:.2g}"


def _score(score: Score) -> str:
    return f"{score.value:.3f}" + ("" if score.error is None else f" ± {score.error:.3f}")


@dataclass(frozen=True)
class _Bar:
    """A bar of a plot: what stands before and behind it, its length and its interval as shares of the width."""

    label: str
    text: str
    length: float
    limits: tuple[float, float] | None = None
    kind: str = "bar"


def _plots(evaluations: Sequence[Evaluation]) -> Iterable[str]:
    """The refusals, the perplexity, and each metric of each task."""
    rates = [
        _Bar(name_of(one) if kind == "bar" else "", f"{rate:.0%}", rate, interval(answers), kind)
        for one in evaluations
        for kind, answers in (("bar", one.harmful), ("bad", one.harmless))
        if (rate := share(answers)) is not None
    ]
    if rates:
        said = (
            "Share of requests refused, with 95 % intervals: harmful (blue, should be high) and harmless (red, should "
            "be low)."
        )
        yield _plot("Refusals", said, rates, [f"{percent}%" for percent in range(0, 101, 25)])
    known = [(one, one.perplexity) for one in evaluations if one.perplexity is not None]
    yield from _compared(
        "Perplexity",
        "Of ordinary texts: should be as before.",
        [(one, value, _perplexity(one)) for one, value in known],
    )
    for key in _metrics(evaluations):
        scores = [(one, _scores(one)[key]) for one in evaluations if key in _scores(one)]
        of_task = [(one, score.value, _score(score)) for one, score in scores]
        yield from _compared(": ".join(key), "Of lm-evaluation-harness, ± its standard error.", of_task)


def _compared(title: str, said: str, values: Sequence[tuple[Evaluation, float, str]]) -> Iterable[str]:
    """A plot of one number of each evaluation, scaled to the largest; of NaN nothing, and nothing without a largest."""
    values = [value for value in values if not math.isnan(value[1])]
    largest = max((value for _, value, _ in values if 0 < value < float("inf")), default=None)
    if largest is not None:
        bars = [_Bar(name_of(one), text, min(max(value / largest, 0.0), 1.0)) for one, value, text in values]
        yield _plot(title, said, bars, [])


def _plot(title: str, said: str, bars: Sequence[_Bar], ticks: Sequence[str]) -> str:
    """Bars below each other, closer where one has no label of its own; `ticks` are spread over the width."""
    parts, y = [], 0
    for bar in bars:
        y += 12 if bar.label and y else 2
        middle = y + ROW / 2 - 4
        parts.append(
            f'<text x="{LEFT - 10}" y="{middle + 4}" text-anchor="end">{html_text(bar.label)}</text>'
            f'<rect class="{bar.kind}" x="{LEFT}" y="{y}" width="{bar.length * _SCALE:.1f}" height="{ROW - 8}"/>'
        )
        end = max(bar.length, bar.limits[1] if bar.limits else 0.0)
        if bar.limits is not None:
            low, high = (LEFT + limit * _SCALE for limit in bar.limits)
            parts.append(f'<line class="limits" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
        parts.append(
            f'<text class="value" x="{LEFT + end * _SCALE + 8:.1f}" y="{middle + 4}">{html_text(bar.text)}</text>'
        )
        y += ROW - 8
    for i, tick in enumerate(ticks):
        x = LEFT + i / (len(ticks) - 1) * _SCALE
        parts.insert(0, f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{y + 6}"/>')
        parts.append(f'<text x="{x}" y="{y + 22}" text-anchor="middle">{tick}</text>')
    return (
        f'<h2>{html_text(title)}</h2><figure><svg viewBox="0 0 {WIDTH} {y + (28 if ticks else 6)}" role="img">'
        f"{''.join(parts)}</svg><figcaption>{html_text(said)}</figcaption></figure>"
    )


def _answers(title: str, kind: str, evaluations: Sequence[Evaluation]) -> str:
    columns: list[tuple[Answer, ...]] = [getattr(evaluation, kind) for evaluation in evaluations]
    if not columns[0]:
        return ""
    header = "".join(f"<th>{html_text(name)}" for name in ("prompt", *map(name_of, evaluations)))
    rows = "".join(
        f"<tr><td>{html_text(row[0].prompt)}" + "".join(map(_answer, row)) for row in zip(*columns, strict=True)
    )
    return f"<h2>{title}</h2>{_scrolled(header, rows)}"


def _answer(answer: Answer) -> str:
    verdict = {True: "refused", False: "answered", None: "unsure"}[answer.refused]
    return f"<td><span class={verdict}>{verdict}</span> {html_text(answer.text)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _scrolled(
        "".join(f"<th>{html_text(name)}" for name in header),
        "".join("<tr>" + "".join(f"<td>{html_text(cell)}" for cell in row) for row in rows),
    )


def _scrolled(header: str, rows: str) -> str:
    return f"<div class=scroll><table><thead><tr>{header}</thead><tbody>{rows}</tbody></table></div>"


_STYLE = """<style>svg .limits { stroke: var(--text); stroke-width: 2 } svg .value { fill: var(--text) }
td span { font-size: .8em; padding: .05em .45em; border-radius: .8em; border: 1px solid; margin-right: .3em }
.refused { color: var(--bar) } .answered { color: var(--soft) } .unsure { color: var(--bad) }</style>"""
