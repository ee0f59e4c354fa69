"""An evaluation for people: a Markdown table, and one HTML page with a plot and every answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastlock.evaluate import Answer, Evaluation, interval
from fastlock.page import facts_list, head, html_text
from fastlock.version import __version__

COLUMNS = ("model", "refuses harmful", "refuses harmless", "perplexity")
WIDTH, LEFT, ROW = 960, 190, 30
_SCALE = WIDTH - LEFT - 40
_KINDS = (("Harmful requests", "harmful"), ("Harmless requests", "harmless"))


def report_markdown(evaluations: Sequence[Evaluation], facts: dict[str, str]) -> str:
    """A table of the rates with their 95 % intervals, below a list of facts."""
    lines = [f"- {key}: {value}" for key, value in {**facts, "fastlock": __version__}.items()]
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, evaluations)]
    return "\n".join([*lines, "", *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def report_html(evaluations: Sequence[Evaluation], facts: dict[str, str]) -> str:
    """The page: facts, plot, table, and what the model answered to each prompt."""
    return "\n".join(
        [
            head("fastlock evaluation"),
            "<h1>fastlock evaluation</h1>",
            facts_list({**facts, "fastlock": __version__}),
            "<h2>Refusals</h2>",
            _plot(evaluations),
            _table(COLUMNS, map(cells, evaluations)),
            *(_answers(title, name, evaluations) for title, name in _KINDS),
            "</body></html>",
        ]
    )


def name_of(evaluation: Evaluation) -> str:
    """What a row is called."""
    if evaluation.lock is None:
        return "as it is"
    return f"lock {evaluation.lock[:8]} at strength {evaluation.strength:g}"


def cells(evaluation: Evaluation) -> tuple[str, ...]:
    """A row of a table, in the order of `COLUMNS`."""
    perplexity = "" if evaluation.perplexity is None else f"{evaluation.perplexity:.2f}"
    return name_of(evaluation), _rate(evaluation.harmful), _rate(evaluation.harmless), perplexity


def _rate(answers: Sequence[Answer]) -> str:
    if (limits := interval(answers)) is None:
        return ""
    share = sum(answer.refused for answer in answers) / len(answers)
    return f"{share:.0%} ({limits[0]:.0%} to {limits[1]:.0%}; {len(answers)} prompts)"


def _plot(evaluations: Sequence[Evaluation]) -> str:
    """Bars of both rates, each with its interval."""
    parts, y = [], 10
    for evaluation in evaluations:
        parts.append(f'<text x="{LEFT - 8}" y="{y + ROW}" text-anchor="end">{html_text(name_of(evaluation))}</text>')
        for kind, answers in (("bar", evaluation.harmful), ("bad", evaluation.harmless)):
            if (limits := interval(answers)) is not None:
                share = sum(answer.refused for answer in answers) / len(answers)
                label = f"{'harmful' if kind == 'bar' else 'harmless'} requests refused: {_rate(answers)}"
                parts.append(
                    f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{share * _SCALE:.1f}" height="{ROW - 10}">'
                    f"<title>{label}</title></rect>"
                    f'<line class="limits" x1="{LEFT + limits[0] * _SCALE:.1f}" x2="{LEFT + limits[1] * _SCALE:.1f}" '
                    f'y1="{y + ROW / 2 - 5}" y2="{y + ROW / 2 - 5}"/>'
                )
            y += ROW - 4
        y += 14
    for percent in range(0, 101, 25):
        x = LEFT + percent / 100 * _SCALE
        parts.insert(0, f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{y}"/>')
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{percent} %</text>')
    return (
        "<style>svg .limits { stroke: var(--text); stroke-width: 2 }</style>"
        f'<figure><svg viewBox="0 0 {WIDTH} {y + 22}" role="img">{"".join(parts)}</svg>'
        "<figcaption>Share of requests refused, with 95 % intervals: harmful (blue, should be high), harmless (red, "
        "should be low).</figcaption></figure>"
    )


def _answers(title: str, kind: str, evaluations: Sequence[Evaluation]) -> str:
    columns: list[tuple[Answer, ...]] = [getattr(evaluation, kind) for evaluation in evaluations]
    if not columns[0]:
        return ""
    rows = [
        (column[0].prompt, *(("refused: " if answer.refused else "") + answer.text for answer in column))
        for column in zip(*columns, strict=True)
    ]
    return f"<h2>{title}</h2>" + _table(("prompt", *map(name_of, evaluations)), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    header = "".join(f"<th>{html_text(column)}" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html_text(cell)}" for cell in row) for row in rows)
    return f"<div class=scroll><table><thead><tr>{header}</thead><tbody>{body}</tbody></table></div>"
