"""A calibration on disk, and for people: a picture of every trial with the frontier, and an HTML page around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlock.evaluation.report import cells, columns
from fastlock.html_page import Axis, facts_list, figure, head, html_text, label, mark, svg, table, x_axis, y_axis
from fastlock.recipes.calibration import Calibration
from fastlock.recipes.trials import MAX_COST, MAX_OVER_REFUSALS, Trial
from fastlock.storage.files import write_atomic
from fastlock.version import __version__

COLUMNS = ("recipe", "tokens", "heads", "strength", "refuses harmful", "refuses harmless", "perplexity")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 20, 20, 50
INSET = 14  # between the axes and 0 %: otherwise the ring would cover a label
LOCK_FILE = "lock.safetensors"


def to_json(calibration: Calibration, facts: dict[str, str]) -> dict[str, Any]:
    """Facts and calibration as data that JSON can hold."""
    return {**facts, **calibration.to_dict()}


def write_calibration(directory: Path, calibration: Calibration, facts: dict[str, str]) -> None:
    """Write the lock, calibration.json, .html and frontier.svg, each as a whole or not at all.

    Where no lock was chosen, one that an earlier run chose is removed.
    """
    if calibration.lock is None:
        (directory / LOCK_FILE).unlink(missing_ok=True)
    else:
        calibration.lock.save(directory / LOCK_FILE)
    data = json.dumps(to_json(calibration, facts), indent=2, allow_nan=False)
    write_atomic(directory / "calibration.json", (data + "\n").encode())
    write_atomic(directory / "calibration.html", calibration_html(calibration, facts).encode())
    write_atomic(directory / "frontier.svg", picture(calibration, alone=True).encode())


def calibration_html(calibration: Calibration, facts: dict[str, str]) -> str:
    """The page: facts, picture, the frontier, and the held-out requests before and after."""
    lock, chosen, held_out = calibration.lock, calibration.chosen, calibration.held_out
    reason = calibration.why_no_lock
    return "\n".join(
        [
            head("fastlock calibration"),
            "<h1>fastlock calibration</h1>",
            facts_list({**facts, "chosen lock": lock.digest if lock else "none", "fastlock": __version__}),
            f"<h2>No lock was chosen</h2><p>{html_text(reason)}</p>" if reason else "",
            figure("What was tried", picture(calibration), CAPTION),
            "<h2>What was chosen (first), and the frontier</h2>",
            table(trial_columns(chosen), map(trial_cells, (chosen, *calibration.frontier))),
            "<h2>Held-out requests</h2>",
            table(columns(held_out), map(cells, held_out)),
            "</body></html>",
        ]
    )


CAPTION = (
    "Each dot is a lock at a strength: how many harmful requests the model then refuses (up is better), and how many "
    "harmless ones (left is better). Blue: the perplexity is kept; the redder, the more it grew. Hollow: it costs more "
    f"than a lock may ({MAX_OVER_REFUSALS:.0%} of the harmless requests, perplexity × {MAX_COST:g}). The line is the "
    "frontier of both rates, and the ring is what was chosen."
)


def trial_columns(trial: Trial) -> tuple[str, ...]:
    """The columns of a table of trials: `COLUMNS`, without how the lock was made if it was given."""
    return COLUMNS[3:] if trial.recipe is None else COLUMNS


def trial_cells(trial: Trial) -> tuple[str, ...]:
    """A row of a table, in the order of `trial_columns`."""
    making = () if trial.recipe is None else (trial.recipe, str(trial.tokens), str(trial.heads))
    return (
        *making,
        f"{trial.strength:.3g}" if trial.strength else "0 (baseline)",
        f"{trial.refusals:.0%}",
        f"{trial.over_refusals:.0%}",
        f"× {trial.cost:.3f}",
    )


def picture(calibration: Calibration, *, alone: bool = False) -> str:
    """Every trial in the plane of both rates, as SVG; `alone` if it is to be a file."""
    x, y = Axis(0, 1, LEFT + INSET, WIDTH - RIGHT), Axis(0, 1, HEIGHT - BOTTOM - INSET, TOP)
    ticks = [(percent / 100, f"{percent} %") for percent in range(0, 101, 20)]
    frontier = " ".join(f"{x(over):.1f},{y(refusals):.1f}" for over, refusals in _corners(calibration.frontier))
    chosen = calibration.chosen
    marks = [
        x_axis(x, ticks, TOP, HEIGHT - BOTTOM),
        y_axis(y, ticks, LEFT, WIDTH - RIGHT),
        label("harmless requests refused", x(0.5), HEIGHT - 12, "middle"),
        label("harmful requests refused", 0, 0, "middle", transform=f"translate(10 {y(0.5):.1f}) rotate(-90)"),
        mark("polyline", kind="frontier", points=frontier),
        *(_dot(trial, x, y) for trial in calibration.trials),
        mark("circle", kind="chosen", cx=x(chosen.over_refusals), cy=y(chosen.refusals), r=10),
    ]
    return svg(WIDTH, HEIGHT, CAPTION, marks, alone=alone)


def _corners(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """The best refusals that each rate of over-refusals allows, whatever the cost."""
    corners: list[tuple[float, float]] = []
    for trial in sorted(trials, key=lambda trial: (trial.over_refusals, -trial.refusals)):
        if not corners or trial.refusals > corners[-1][1]:
            corners.append((trial.over_refusals, trial.refusals))
    return corners


def _dot(trial: Trial, x: Axis, y: Axis) -> str:
    """Blue where the cost is kept, red where it has doubled; hollow where it is more than a lock may cost."""
    growth = min(1.0, max(0.0, trial.cost - 1))
    colour = f"rgb({61 + 150 * growth:.0f},{143 - 100 * growth:.0f},{209 - 165 * growth:.0f})"
    place = {"cx": x(trial.over_refusals), "cy": y(trial.refusals), "r": 4.5}
    filling = {"fill": colour, "fill_opacity": ".8" if trial.fits else "0"}
    return mark("circle", ", ".join(trial_cells(trial)), **place, **filling, stroke=colour, stroke_width=1.5)
