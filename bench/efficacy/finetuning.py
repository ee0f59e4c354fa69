"""Which ways of fine-tuning keep a model's refusals: plain, SPPFT, Lisa, both; each without and with a calibrated lock.

Needs what `make demo` sets up. The model is the demo's aligned base, SmolLM2-135M-Instruct taught to refuse, asked
without its default system message. A cell is a method, a share of harmful rows in the user's data, and a seed; each is
kept in a journal at once, and the same command goes on from there. Seeds come outermost, so a run that was stopped is a
full table of fewer seeds. The table is printed at the end, or with --report from what the journal has so far.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import fastlock
from bench.efficacy import finetuning_cells, tuned_models
from bench.efficacy import tuned_prompts as made
from bench.efficacy.benign_task import Lessons
from bench.efficacy.finetuning_cells import Method, Settings
from bench.efficacy.finetuning_table import COLUMNS, PLAIN, RATES, comparable, rate, table_rows
from bench.lib.journal import Journal, Record, read_journal
from bench.lib.machine import describe
from bench.lib.printed import PrintedTable, say
from bench.lib.smollm2 import load_smollm2, with_adapter
from fastlock.evaluation.prompts import Prompts, shipped_prompts

LOCK = tuned_models.ROOT / "examples" / "smollm2-aligned.lock.safetensors"
KEPT = tuned_models.ROOT / "build" / "finetuning" / "journal.jsonl"
SEEDS = 3
SHARES = (0.0, 0.05, 0.1, 0.2)
ACTS, PAPERS = 0.1, 1.0
METHODS = (
    Method(PLAIN),
    Method("SPPFT", frozen=True),
    Method(f"Lisa, ρ {ACTS:g}", pull=ACTS),
    Method(f"Lisa, ρ {PAPERS:g} (the paper's)", pull=PAPERS),
    Method(f"SPPFT and Lisa, ρ {ACTS:g}", frozen=True, pull=ACTS),
)
SETTINGS = Settings()
# Of the shipped texts the first decide a strength, and the next give the perplexity in the table.
DECIDING_TEXTS, TEXTS = 2, 4
# What the aligned model answers to so many ordinary questions is what the user's data has of them.
ORDINARY = 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--journal", type=Path, default=KEPT, help="relative to the repository")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true", help="train nothing; tell what the journal has")
    options = parser.parse_args()
    if not options.report:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        made_ready = Bench()
        journal = Journal(tuned_models.ROOT / options.journal, made_ready.settings(), facts())
        if not any("base" in record for record in journal.records):
            journal.add({"base": made_ready.measured(made_ready.base)})
        fill(journal, options.seeds, made_ready.cell)
    report(options.journal, options.seeds)
    return 0


def facts() -> Record:
    """What a reader should know of the run that began the journal."""
    return describe() | {"command": f"python -m bench.efficacy.finetuning {' '.join(sys.argv[1:])}".rstrip()}


def fill(journal: Journal, seeds: int, cell: Callable[[Method, float, int], Record]) -> None:
    """Do every cell that the journal lacks: seed by seed, share by share, method by method."""
    done = {(record["seed"], record["share"], record["method"]) for record in journal.records if "seed" in record}
    for seed in range(seeds):
        for share in SHARES:
            for method in METHODS:
                if (seed, share, method.name) not in done:
                    journal.add({"seed": seed, "share": share, "method": method.name} | cell(method, share, seed))
                    print(f"seed {seed}, {share:.0%}, {method.name}", file=sys.stderr, flush=True)


class Bench:
    """The aligned base, its tokenizer, the lock, and what the user's ordinary rows say."""

    def __init__(self) -> None:
        model, self.tokenizer = load_smollm2()
        self.base = with_adapter(model, "aligned")
        self.tokenizer.chat_template = without_system_message(self.tokenizer.chat_template)
        self.lock = fastlock.Lock.load(LOCK)
        texts = shipped_prompts().texts
        self.deciding, self.texts = texts[:DECIDING_TEXTS], texts[DECIDING_TEXTS : DECIDING_TEXTS + TEXTS]
        self.own = own_answers(self.base, self.tokenizer)

    def settings(self) -> Record:
        """What decides every cell."""
        prompts = [made.HARMFUL_TEST, made.HARMLESS_TEST, made.HARMFUL_DECIDE, made.HARMLESS_DECIDE, self.texts]
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return asdict(SETTINGS) | {
            "band": list(SETTINGS.band),
            "strengths": list(SETTINGS.strengths),
            "methods": [asdict(method) for method in METHODS],
            "shares": list(SHARES),
            "lock": self.lock.digest,
            "prompts": digest(prompts),
            "ordinary rows": digest(self.own),
            **versions,
        }

    def measured(self, model: Any) -> Record:
        """What is reported of a model."""
        return finetuning_cells.measured(model, self.tokenizer, SETTINGS, self.texts)

    def cell(self, method: Method, share: float, seed: int) -> Record:
        """Fine-tune, measure, calibrate the lock, and measure with it."""
        tuned = finetuning_cells.tuned(self.base, self.tokenizer, self.own, method, share, SETTINGS, seed)
        without = self.measured(tuned.model)
        strength, trials = finetuning_cells.strength_for(
            tuned.model, self.tokenizer, self.lock, SETTINGS, self.deciding
        )
        locked = without
        if strength:
            with fastlock.relocked(tuned.model, self.lock, strength):
                locked = self.measured(tuned.model)
        return {
            "without": without,
            "with": locked,
            "strength": strength,
            "trials": [trial.to_dict() for trial in trials],
            "seconds": tuned.seconds,
            "state_bytes": tuned.state_bytes,
            "steps": tuned.steps,
            "losses": tuned.losses,
        }


def without_system_message(template: str) -> str:
    """SmolLM2's chat template without the default system message, which is as long as the questions themselves."""
    first, end = "{% if loop.first", "{% endif %}"
    before, after = template.split(first, 1)
    return before + after.split(end, 1)[1]


def own_answers(model: Any, tokenizer: Any) -> Lessons:
    """What the model says to ordinary questions; those that it refuses are left out."""
    asked = random.Random(0).sample(made.HARMLESS_TRAIN, ORDINARY)
    prompts = Prompts(harmless=tuple(asked))
    said = fastlock.evaluate(model, tokenizer, prompts, new_tokens=12, batch_size=48)[0].harmless
    return [(answer.prompt, answer.text) for answer in said if not answer.refused]


def digest(value: Any) -> str:
    """SHA-256 (hex) of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def report(journal: Path, seeds: int) -> None:
    """The table, and what it was made of."""
    head, records = read_journal(tuned_models.ROOT / journal)
    base = next((record["base"] for record in records if "base" in record), None)
    cells = [record for record in records if "seed" in record and record["seed"] < seeds]
    missing = seeds * len(SHARES) * len(METHODS) - len(cells)
    if missing:
        say(
            f"**Not finished: {missing} of {missing + len(cells)} cells of {seeds} seeds are missing.** "
            f"`python -m bench.efficacy.finetuning --journal {journal}` goes on with them."
        )
    say("The journal was begun on:")
    facts = PrintedTable(["", ""])
    for key, value in head["facts"].items():
        facts.row(key, str(value))
    say("Settings: " + "; ".join(f"{key} {value}" for key, value in head["settings"].items() if key != "methods"))
    if base is not None:
        refused, over_refused, right = (rate([base], name) for name in RATES)
        say(
            f"The aligned base refuses {refused} of the harmful requests and {over_refused} of the harmless ones, has "
            f"{right} of the task right, and a perplexity of {base['perplexity']:.1f}."
        )
    table = PrintedTable(COLUMNS)
    shown = comparable(cells, len(METHODS))
    for row in table_rows(shown):
        table.row(*row)
    rest = [f"seed {cell['seed']}, {cell['share']:.0%}, {cell['method']}" for cell in cells if cell not in shown]
    if rest:
        say("In the journal, and not in the table, as others of their seed and share are missing: " + "; ".join(rest))


if __name__ == "__main__":
    sys.exit(main())
