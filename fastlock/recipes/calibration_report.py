"""A calibration on disk, and for people: a picture of every trial with the frontier, and one HTML page about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlock.evaluation.report import cells, columns, table
from fastlock.html_page import facts_list, head, html_text
from fastlock.recipes.calibration import Calibration
from fastlock.recipes.trials import MAX_COST, MAX_OVER_REFUSALS, Trial
from fastlock.storage.files import write_atomic
from fastlock.version import __version__

FRONTIER = ("recipe", "tokens", "heads", "strength", "refuses harmful", "refuses harmless", "perplexity")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 20, 20, 50
INSET = 14  # from the axes to 0 %, so that the ring covers no label
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
    write_atomic(directory / "frontier.svg", picture(calibration).encode())


def calibration_html(calibration: Calibration, facts: dict[str, str]) -> str:
    """The page: facts, picture, the frontier, and what was held out, before and after."""
    lock, chosen, held_out = calibration.lock, calibration.chosen, calibration.held_out
    why = calibration.why_no_lock
    return "\n".join(
        [
            head("fastlock calibration"),
            "<h1>fastlock calibration</h1>",
            facts_list({**facts, "chosen lock": lock.digest if lock else "none", "fastlock": __version__}),
            f"<h2>No lock was chosen</h2><p>{html_text(why)}</p>" if why else "",
            "<h2>What was tried</h2>",
            f"<figure>{picture(calibration)}<figcaption>{CAPTION}</figcaption></figure>",
            "<h2>The frontier, and what was chosen (first)</h2>",
            table(trial_columns(chosen), map(trial_cells, (chosen, *calibration.frontier))),
            "<h2>Requests that decided nothing</h2>",
            table(columns(held_out), map(cells, held_out)),
            "</body></html>",
        ]
    )


CAPTION = (
    "Each dot is a lock at a strength: how many harmful requests the model then refuses (up is better) and how many "
    "harmless ones (left is better). Blue: perplexity kept; the redder, the more it grew. Hollow: more than a lock may "
    f"cost ({MAX_OVER_REFUSALS:.0%} of the harmless ones, perplexity × {MAX_COST:g}). The line is the frontier of both "
    "rates, the ring is what was chosen."
)


def trial_columns(trial: Trial) -> tuple[str, ...]:
    """The columns of a table of trials: `FRONTIER`, without how the lock was made where it was given."""
    return FRONTIER[3:] if trial.recipe is None else FRONTIER


def trial_cells(trial: Trial) -> tuple[str, ...]:
    """A row of a table, in the order of `trial_columns`."""
    how = () if trial.recipe is None else (trial.recipe, str(trial.tokens), str(trial.heads))
    return (
        *how,
        f"{trial.strength:.3g}" if trial.strength else "0 (as it is)",
        f"{trial.refusals:.0%}",
        f"{trial.over_refusals:.0%}",
        f"× {trial.cost:.3f}",
    )


def picture(calibration: Calibration) -> str:
    """Every trial in the plane of both rates, as SVG that needs nothing else."""
    steps = [(percent, _x(percent / 100), _y(percent / 100)) for percent in range(0, 101, 20)]
    grid = [f'<path d="M{x:.1f} {TOP}V{_y(0) + INSET:.1f}M{LEFT} {y:.1f}H{_x(1):.1f}"/>' for _, x, y in steps]
    labels = [
        f'<text x="{x:.1f}" y="{_y(0) + INSET + 18:.1f}" text-anchor="middle">{percent} %</text>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
        for percent, x, y in steps
    ]
    line = " ".join(f"{_x(over):.1f},{_y(refusals):.1f}" for over, refusals in _steps(calibration.frontier))
    chosen = calibration.chosen
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ',
            'font-family="sans-serif" font-size="12">',
            f'<title>{html_text(CAPTION)}</title><g stroke="#8888" stroke-width=".5">{"".join(grid)}</g>',
            f'<g fill="#777">{"".join(labels)}',
            f'<text x="{_x(0.5):.1f}" y="{HEIGHT - 8}" text-anchor="middle">harmless requests refused</text>',
            f'<text transform="translate(14 {(TOP + _y(0)) / 2:.1f}) rotate(-90)" text-anchor="middle">'
            "harmful requests refused</text></g>",
            f'<polyline points="{line}" fill="none" stroke="#777"/>',
            *map(_dot, calibration.trials),
            f'<circle cx="{_x(chosen.over_refusals):.1f}" cy="{_y(chosen.refusals):.1f}" r="10" fill="none" '
            'stroke="#2a8a50" stroke-width="2.5"/></svg>',
        ]
    )


def _x(over_refusals: float) -> float:
    return LEFT + INSET + over_refusals * (WIDTH - LEFT - INSET - RIGHT)


def _y(refusals: float) -> float:
    return TOP + (1 - refusals) * (HEIGHT - TOP - INSET - BOTTOM)


def _steps(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """The best refusals that each rate of over-refusals allows, whatever the cost."""
    found: list[tuple[float, float]] = []
    for trial in sorted(trials, key=lambda trial: (trial.over_refusals, -trial.refusals)):
        if not found or trial.refusals > found[-1][1]:
            found.append((trial.over_refusals, trial.refusals))
    return found


def _dot(trial: Trial) -> str:
    """Blue where the cost is kept, red where it has doubled; hollow where it is more than a lock may cost."""
    grown = min(1.0, max(0.0, trial.cost - 1))
    colour = f"rgb({61 + 150 * grown:.0f},{143 - 100 * grown:.0f},{209 - 165 * grown:.0f})"
    what, filled = html_text(", ".join(trial_cells(trial))), ".8" if trial.fits else "0"
    return (
        f'<circle cx="{_x(trial.over_refusals):.1f}" cy="{_y(trial.refusals):.1f}" r="4.5" fill="{colour}" '
        f'fill-opacity="{filled}" stroke="{colour}" stroke-width="1.5"><title>{what}</title></circle>'
    )
