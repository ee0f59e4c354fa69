"""A calibration for people: a picture of every trial with the frontier, and one HTML page about it."""

from __future__ import annotations

from collections.abc import Sequence

from fastlock.calibrate import Calibration, Trial
from fastlock.evaluate_report import cells, columns, table
from fastlock.page import facts_list, head, html_text
from fastlock.version import __version__

FRONTIER = ("recipe", "tokens", "heads", "strength", "refuses harmful", "refuses harmless", "perplexity")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 20, 20, 50


def calibration_html(calibration: Calibration, facts: dict[str, str]) -> str:
    """The page: facts, picture, the frontier, and what was held out, before and after."""
    held_out = [calibration.before, calibration.after]
    return "\n".join(
        [
            head("fastlock calibration"),
            "<h1>fastlock calibration</h1>",
            facts_list({**facts, "lock": calibration.lock.digest, "fastlock": __version__}),
            "<h2>What the locks did</h2>",
            f"<figure>{picture(calibration)}<figcaption>{CAPTION}</figcaption></figure>",
            "<h2>The frontier, and the chosen lock (first)</h2>",
            table(FRONTIER, map(trial_cells, (calibration.chosen, *calibration.frontier))),
            "<h2>Requests that decided nothing</h2>",
            table(columns(held_out), map(cells, held_out)),
            "</body></html>",
        ]
    )


CAPTION = (
    "Each dot is a lock at a strength: how many harmful requests the model then refuses (up is better) and how many "
    "harmless ones (left is better). Blue: perplexity kept; the redder, the more it grew. The line is the frontier, "
    "the ring is the chosen lock."
)


def trial_cells(trial: Trial) -> tuple[str, ...]:
    """A row of the frontier's table, in the order of `FRONTIER`."""
    return (
        trial.recipe,
        str(trial.last_tokens),
        str(trial.heads),
        f"{trial.strength:.3g}",
        f"{trial.refusals:.0%}",
        f"{trial.over_refusals:.0%}",
        f"× {trial.cost:.3f}",
    )


def picture(calibration: Calibration) -> str:
    """Every trial in the plane of both rates, as SVG that needs nothing else."""
    steps = [(percent, _x(percent / 100), _y(percent / 100)) for percent in range(0, 101, 20)]
    grid = [f'<path d="M{x:.1f} {TOP}V{_y(0):.1f}M{LEFT} {y:.1f}H{_x(1):.1f}"/>' for _, x, y in steps]
    labels = [
        f'<text x="{x:.1f}" y="{_y(0) + 18:.1f}" text-anchor="middle">{percent} %</text>'
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
    return LEFT + over_refusals * (WIDTH - LEFT - RIGHT)


def _y(refusals: float) -> float:
    return TOP + (1 - refusals) * (HEIGHT - TOP - BOTTOM)


def _steps(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """The best refusals that each rate of over-refusals allows, whatever the cost."""
    found: list[tuple[float, float]] = []
    for trial in sorted(trials, key=lambda trial: (trial.over_refusals, -trial.refusals)):
        if not found or trial.refusals > found[-1][1]:
            found.append((trial.over_refusals, trial.refusals))
    return found


def _dot(trial: Trial) -> str:
    """Blue where the cost is kept, red where it has doubled."""
    grown = min(1.0, max(0.0, trial.cost - 1))
    colour = f"rgb({61 + 150 * grown:.0f},{143 - 100 * grown:.0f},{209 - 165 * grown:.0f})"
    what = html_text(f"{', '.join(trial_cells(trial))}")
    return (
        f'<circle cx="{_x(trial.over_refusals):.1f}" cy="{_y(trial.refusals):.1f}" r="4.5" fill="{colour}" '
        f'fill-opacity=".8"><title>{what}</title></circle>'
    )
