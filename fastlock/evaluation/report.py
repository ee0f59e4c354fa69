"""An evaluation on disk, and for people: a Markdown table, and an HTML page with plots and every answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlock.errors import DamagedError, FastlockError, shown
from fastlock.evaluation.evaluator import Answer, Evaluation, interval, share
from fastlock.evaluation.lm_eval_harness import Score
from fastlock.html_page import Axis, facts_list, figure, head, html_text, label, mark, svg, table, table_of, x_axis
from fastlock.storage.files import read_bounded, write_atomic

COLUMNS = ("model", "refuses harmful", "refuses harmless", "perplexity")
WIDTH, LEFT, RIGHT, HEIGHT = 960, 210, 120, 22  # of the plots, and the height of a bar
MAX_FILE_BYTES = 1024 * 1024 * 1024
_JSON = "evaluation.json"
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
        DamagedError: the report is damaged, or fastlock did not write it.
        FastlockError: it is of another evaluation, or holds more than is asked for now, which would be overwritten.
    """
    path = directory / _JSON
    if not path.exists():
        return []
    remedy = "Give another --out, or move it away."
    try:
        data = json.loads(read_bounded(path, MAX_FILE_BYTES))
        entries = data.pop("evaluations")
        evaluations = [Evaluation.from_dict(entry) for entry in entries]
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be resumed ({error}). {remedy}") from None
    for key in {**facts, **data}:
        if data.get(key) != facts.get(key):
            raise FastlockError(
                f"{path}: it is of another evaluation: {key} was {data.get(key)!r:.300}, and is now "
                f"{facts.get(key)!r:.300}. {remedy}"
            )
    expected = {(None, None), *asked}
    for one in evaluations:
        if (one.lock, one.strength) not in expected:
            raise FastlockError(
                f"{path}: it also holds the {name_of(one)}, which is not asked for now. Ask for it as well, or give "
                "another --out."
            )
    return evaluations


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
        return "baseline"
    return f"lock {evaluation.lock[:8]} at strength {evaluation.strength:g}"


def columns(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """The columns of a table: `COLUMNS`, and one for each metric of each task."""
    return (*COLUMNS, *(f"{task} {metric}" for task, metric in _metrics(evaluations)))


def table_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    """The rows of a table, in the order of `columns`; a cell is empty where an evaluation lacks the metric."""
    rows = []
    for one in evaluations:
        scores = _scores(one)
        tasks = [_score(scores[key]) if key in scores else "" for key in _metrics(evaluations)]
        rows.append((name_of(one), _rate(one.harmful), _rate(one.harmless), _perplexity(one), *tasks))
    return rows


def cells(evaluation: Evaluation) -> tuple[str, ...]:
    """The row of an evaluation in a table of its own."""
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

    name: str
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
        caption = (
            "Share of requests refused, with 95 % intervals: harmful (blue, should be high) and harmless (red, should "
            "be low)."
        )
        yield figure("Refusals", _bars("Refusals", rates, range(0, 101, 25)), caption)
    measured = [(one, one.perplexity) for one in evaluations if one.perplexity is not None]
    yield from _compared(
        "Perplexity",
        "Of ordinary texts: should stay as it was.",
        [(one, value, _perplexity(one)) for one, value in measured],
    )
    for key in _metrics(evaluations):
        scores = [(one, _scores(one)[key]) for one in evaluations if key in _scores(one)]
        values = [(one, score.value, _score(score)) for one, score in scores]
        yield from _compared(": ".join(key), "By lm-evaluation-harness, ± its standard error.", values)


def _compared(title: str, caption: str, values: Sequence[tuple[Evaluation, float, str]]) -> Iterable[str]:
    """A figure of one number of each evaluation, scaled to the largest; NaN is left out, and all if none is finite."""
    values = [value for value in values if not math.isnan(value[1])]
    largest = max((value for _, value, _ in values if 0 < value < float("inf")), default=None)
    if largest is not None:
        bars = [_Bar(name_of(one), text, min(max(value / largest, 0.0), 1.0)) for one, value, text in values]
        yield figure(title, _bars(title, bars), caption)


def _bars(title: str, bars: Sequence[_Bar], percents: Iterable[int] = ()) -> str:
    """A picture of bars below each other, closer where one has no name of its own, with an axis if there are ticks."""
    axis, ticks = Axis(0, 1, LEFT, WIDTH - RIGHT), [(percent / 100, f"{percent}%") for percent in percents]
    marks, y = [], 0.0
    for bar in bars:
        y += 12 if bar.name and y else 2
        marks.append(_marks(bar, axis, y))
        y += HEIGHT
    return svg(WIDTH, y + (28 if ticks else 6), title, [x_axis(axis, ticks, 0, y + 6), *marks])


def _marks(bar: _Bar, axis: Axis, y: float) -> str:
    middle, end = y + HEIGHT / 2, max(bar.length, bar.limits[1] if bar.limits else 0.0)
    marks = [
        label(bar.name, LEFT - 10, middle, "end"),
        mark("rect", kind=bar.kind, x=LEFT, y=y, width=axis(bar.length) - LEFT, height=HEIGHT),
        label(bar.text, axis(end) + 8, middle, kind="value"),
    ]
    if bar.limits is not None:
        low, high = map(axis, bar.limits)
        marks.append(mark("line", kind="limits", x1=low, x2=high, y1=middle, y2=middle))
    return "".join(marks)


def _answers(title: str, kind: str, evaluations: Sequence[Evaluation]) -> str:
    answers: list[tuple[Answer, ...]] = [getattr(evaluation, kind) for evaluation in evaluations]
    if not answers[0]:
        return ""
    header = "".join(f"<th>{html_text(name)}" for name in ("prompt", *map(name_of, evaluations)))
    rows = "".join(
        f"<tr><td>{html_text(row[0].prompt)}" + "".join(map(_answer, row)) for row in zip(*answers, strict=True)
    )
    return f"<h2>{title}</h2>{table_of(header, rows)}"


def _answer(answer: Answer) -> str:
    verdict = {True: "refused", False: "answered", None: "unsure"}[answer.refused]
    return f"<td><span class={verdict}>{verdict}</span> {html_text(answer.text)}"


_STYLE = """<style>
td span { font-size: .8em; padding: .05em .45em; border-radius: .8em; border: 1px solid; margin-right: .3em }
.refused { color: var(--bar) } .answered { color: var(--soft) } .unsure { color: var(--bad) }</style>"""
