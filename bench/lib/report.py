"""From what the steps left to what is kept in bench/results/: Markdown, JSON, and the summary that is printed last."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from bench.lib.recording import Row, last_lines
from bench.lib.steps import Outcome
from bench.lib.tables import table

Rows: TypeAlias = list[Row]
# The summary is to be seen where only the last lines of an output are.
SUMMARY_LINES, SUMMARY_COLUMNS = 20, 160


@dataclass(frozen=True)
class Report:
    """How the rows of a benchmark are told.

    Attributes:
        section: Markdown, from its heading on.
        picture: an SVG, shown before it; None if these rows make none.
        headline: what of it belongs in the summary, a line each.
    """

    section: Callable[[Rows], list[str]]
    picture: Callable[[Rows], str | None] | None = None
    headline: Callable[[Rows], list[str]] | None = None


@dataclass(frozen=True)
class Done:
    """A step that ended, and how it is reported; None: by its outcome alone."""

    outcome: Outcome
    report: Report | None


@dataclass
class Results:
    """All of a run so far. It is written after each step, so that what comes later can only add to it.

    Attributes:
        directory: where it is written.
        name: of the files, without their endings.
        facts: date, command, machine.
        steps: in the order in which they ran.
        total: how many steps there will be.
        unwritten: why it could not be written the last time, if so.
        interrupted: whether somebody ended the run.
    """

    directory: Path
    name: str
    facts: dict[str, Any]
    total: int
    steps: list[Done] = field(default_factory=list)
    unwritten: str = ""
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether anything failed so far, or was not run, or could not be written."""
        troubles = [step for step in self.steps if step.outcome.failed or not step.outcome.ran]
        return bool(troubles or self.unwritten or self.interrupted)

    def write(self) -> None:
        """Write NAME.json, NAME.md, and NAME.STEP.svg where there is a picture; each at once, not in pieces.

        Where that fails, the steps to come have still to be run: it is said, and tried again after each.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            replace(self.directory / f"{self.name}.json", self.to_json())
            replace(self.directory / f"{self.name}.md", self.to_markdown())
            self.unwritten = ""
        except OSError as error:
            self.unwritten = str(error)

    def to_json(self) -> str:
        """Everything, as JSON."""
        took = sum(step.outcome.seconds for step in self.steps)
        steps = [step.outcome.to_json() for step in self.steps]
        rows = {step.outcome.step: step.outcome.rows for step in self.steps if step.outcome.rows}
        data = {**self.facts, "took_seconds": took, "unfinished": self.total - len(self.steps)}
        return json.dumps(data | {"steps": steps, "rows": rows}, indent=1, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """The whole report. A section that cannot be made costs only itself."""
        machine = self.facts["machine"]
        took = sum(step.outcome.seconds for step in self.steps)
        lines = [f"# Benchmarks on {machine['device']}, {self.facts['date']}", ""]
        lines += [f"Written by `{self.facts['command']}` ({took:.0f} s); the same numbers are in {self.name}.json.", ""]
        if len(self.steps) < self.total:
            lines += [f"**Not finished: {len(self.steps)} of {self.total} steps.**", ""]
        if self.facts.get("tiny"):
            lines += ["**Tiny shapes, only to see that everything runs: the numbers mean nothing.**", ""]
        lines += table(["", ""], [[key, value] for key, value in machine.items()])
        lines += self._outcomes()
        for step in self.steps:
            try:
                lines += self._section(step)
            except Exception as error:  # rows of a shape that nobody expected
                lines += [f"## {step.outcome.step}", "", f"No section could be made of its rows: {error!r}", ""]
        return "\n".join(lines).rstrip() + "\n"

    def summary(self) -> list[str]:
        """At most SUMMARY_LINES: what each step came to, what matters most, and where the files are."""
        lines = []
        for step in self.steps:
            outcome = step.outcome
            counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
            why = f" - {last_lines(outcome.problems[0]).splitlines()[-1]}" if outcome.problems else ""
            if outcome.skips and not outcome.passed and not why:
                why = f" - {outcome.skips[0]}"
            verdict = "NOT RUN" if not outcome.ran else "FAILED" if outcome.failed else "ok"
            lines.append(f"{verdict:<8}{outcome.step}: {counts}{why}"[:SUMMARY_COLUMNS])
        headlines = [
            part for step in self.steps for line in _headline(step) for part in textwrap.wrap(line, SUMMARY_COLUMNS)
        ]
        room = max(0, SUMMARY_LINES - 1 - len(lines))
        where = f"Results: {self.directory / self.name}.md and .json"
        return [*lines, *headlines[:room], f"RESULTS NOT WRITTEN: {self.unwritten}" if self.unwritten else where]

    def _outcomes(self) -> list[str]:
        rows = [
            [o.step, *(str(count) for count in (o.passed, o.failed, o.skipped)), f"{o.seconds:.0f} s"]
            for o in (step.outcome for step in self.steps)
        ]
        lines = ["## The steps of this run", "", *table(["step", "passed", "failed", "skipped", "took"], rows)]
        problems = [problem for step in self.steps for problem in step.outcome.problems]
        lines += ["What failed, with the last lines of why:", ""] if problems else []
        for problem in problems:
            lines += ["```", *problem.splitlines(), "```", ""]
        return lines

    def _section(self, step: Done) -> list[str]:
        if step.report is None or not step.outcome.rows:
            return []
        lines = step.report.section(step.outcome.rows)
        svg = step.report.picture(step.outcome.rows) if step.report.picture else None
        if svg is None:
            return lines
        picture = f"{self.name}.{step.outcome.step}.svg"
        replace(self.directory / picture, svg)
        return [*lines, f"![{step.outcome.step}]({picture})", ""]


def printed_section(title: str) -> Callable[[Rows], list[str]]:
    """A section of what `bench.lib.printed` wrote down: the same Markdown as was printed."""

    def section(rows: Rows) -> list[str]:
        lines, columns = [f"## {title}", ""], None
        for i, row in enumerate(rows):
            if "text" in row:
                lines += [row["text"], ""]
            elif row["columns"] != columns:
                cells = [other["cells"] for other in _alike(rows[i:])]
                lines += table(row["columns"], cells)
            columns = row.get("columns")
        return lines

    return section


def replace(path: Path, text: str) -> None:
    """Write a file as a whole, or leave what was there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)


def _alike(rows: Sequence[Row]) -> list[Row]:
    """The rows of one table, which the first of them begins."""
    for i, row in enumerate(rows):
        if row.get("columns") != rows[0]["columns"]:
            return list(rows[:i])
    return list(rows)


def _headline(step: Done) -> list[str]:
    if step.report is None or step.report.headline is None or not step.outcome.rows:
        return []
    try:
        return step.report.headline(step.outcome.rows)
    except Exception as error:  # as in to_markdown
        return [f"{step.outcome.step}: no headline could be made of its rows: {error!r}"]
