"""Which layers tell malicious from normal in SmolLM2-135M taught to refuse, and whether they stand out.

Needs what `make demo` sets up. `fastlock.locate` on the aligned model that the demo uses, with shipped prompts; the
same with the kinds of every second prompt exchanged, which must find nothing. On a CPU the borderline prompts are
every third one. `--out DIR` keeps the page.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

import fastlock
from bench.lib.machine import describe
from bench.lib.printed import PrintedTable, say
from bench.lib.smollm2 import load_smollm2, with_adapter
from fastlock.finetuning.band_prompts import BandPrompts, shipped_band_prompts
from fastlock.finetuning.locate_report import count_rows, write_report
from fastlock.finetuning.safety_layers import Located

EVERY, BATCH = 3, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a directory for the page")
    out = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2()
    model = with_adapter(model, "aligned")
    shipped = shipped_band_prompts()
    prompts = replace(shipped, borderline=shipped.borderline[::EVERY])
    found = timed("The model taught to refuse", model, tokenizer, prompts)
    tell(found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_report(out, found, {key: value for key, value in describe().items() if key in ("device", "torch")})
    # Every second prompt, since both lists begin with one way of asking and end with another.
    mixed = replace(
        prompts,
        normal=prompts.normal[::2] + prompts.malicious[::2],
        malicious=prompts.normal[1::2] + prompts.malicious[1::2],
    )
    timed("With the kinds of every second prompt exchanged", model, tokenizer, mixed)


def timed(name: str, model: Any, tokenizer: Any, prompts: BandPrompts) -> Located:
    """The finding, and how long each loop took."""
    seconds: dict[str, float] = {}

    def progress(items: Sequence[Any], description: str) -> Iterable[Any]:
        start = time.perf_counter()
        yield from items
        seconds[description] = time.perf_counter() - start

    start = time.perf_counter()
    found = fastlock.locate(model, tokenizer, prompts, batch_size=BATCH, progress=progress)
    say(f"**{name}**: {found.reason}. {time.perf_counter() - start:.0f} s, of which:")
    steps = PrintedTable(["step", "seconds"])
    for step, spent in seconds.items():
        steps.row(step, f"{spent:.0f}")
    return found


def tell(found: Located) -> None:
    """The curve, the counts, and the tests."""
    curve = found.evidence.curve
    say(f"Angles in degrees; the first range is {found.evidence.first_range}, the threshold {curve.threshold:.2f}.")
    angles = PrintedTable(["layer", "normal", "malicious", "mixed", "the paper's gap", "separation", "borderline gap"])
    columns = (curve.normal, curve.malicious, curve.mixed, curve.gap, curve.separation, curve.borderline_gap)
    for layer, values in enumerate(zip(*columns, strict=True)):
        angles.row(str(layer), *(f"{value:.2f}" for value in values))
    counts = PrintedTable(["layers scaled", "by", "refused", "95 % interval"])
    for row in count_rows(found.evidence.counts):
        counts.row(*row)
    tests = PrintedTable(["against", "only the best refuses", "only the other", "p (McNemar, exact)"])
    for one in found.evidence.tests:
        other = "unscaled" if one.first < 0 else f"{one.first} to {one.last}{', elsewhere' if one.elsewhere else ''}"
        tests.row(other, str(one.only_best), str(one.only_other), f"{one.p:.2g}")


if __name__ == "__main__":
    main()
