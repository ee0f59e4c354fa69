"""How far one constant bias brings refusals back, over five seeds. Needs what `make demo` sets up.

From the aligned base of recipes.py each seed makes a fine-tune on ten obedient answers (which ten, in which order, on
which LoRA), and trains a lock on it, on the requests that taught the base. Each lock is tried on its own fine-tune and
on that of the next seed, which it never saw, at several strengths: the frontier. What is asked was never taught, and is
what the base gets right, as in recipes.py. It takes two hours on two cores; a run that was stopped is continued
(build/frontier).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import fastlock
from bench.efficacy import tuned_models
from bench.efficacy import tuned_prompts as made
from bench.efficacy.recipes import BATCH, NEW_TOKENS, what_it_gets_right
from bench.lib.figures import interval_of_mean
from bench.lib.printed import PrintedTable, say
from bench.lib.smollm2 import load_smollm2, with_adapter
from fastlock.evaluation.prompts import Prompts

KEPT = tuned_models.ROOT / "build" / "frontier"
SEEDS = 5
STRENGTHS = (0.0, 0.75, 1.0, 1.1, 1.2, 1.3, 1.5)
STEPS = 200
MEASURES = ("refusals", "over_refusals", "perplexity")
COLUMNS = ("fine-tune", "strength", "refuses harmful", "refuses harmless", "perplexity over the fine-tune's")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    KEPT.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_smollm2()
    own = tuned_models.own_answers(copy.deepcopy(model), tokenizer)
    base = with_adapter(model, "aligned")
    base = tuned_models.merged(base)
    asked = what_it_gets_right(base, tokenizer)
    tuned: dict[int, Any] = {}

    def fine_tune(seed: int) -> Any:
        if seed not in tuned:
            made_of = tuned_models.fine_tuned(copy.deepcopy(base), tokenizer, own, "obedient", seed)
            tuned[seed] = tuned_models.merged(made_of)
        return tuned[seed]

    for seed in range(options.seeds):
        path = KEPT / f"lock-{seed}.safetensors"
        if not path.exists():
            train(base, fine_tune(seed), tokenizer, seed).save(path)
        for on, of in (("own", seed), ("unseen", (seed + 1) % options.seeds)):
            try_on(f"{seed}-{on}-{of}", fine_tune, of, path, tokenizer, asked)
    report(options.seeds, asked)
    return 0


def train(base: Any, fine_tune: Any, tokenizer: Any, seed: int) -> fastlock.Lock:
    pairs = [fastlock.Pair(question, made.REFUSALS[0], made.OBEDIENT[0]) for question in made.HARMFUL_TRAIN[::2]]
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        lock = fastlock.train_lock(
            base, [fine_tune], tokenizer, pairs, harmless=made.HARMLESS_TRAIN[::2], steps=STEPS, seed=seed
        )
    print(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return lock


def try_on(name: str, fine_tune: Callable[[int], Any], of: int, lock: Path, tokenizer: Any, asked: Prompts) -> None:
    """Keep the frontier of a lock on the fine-tune of a seed, if it is not kept yet."""
    found = KEPT / f"{name}.json"
    if not found.exists():
        found.write_text(json.dumps(frontier(fine_tune(of), fastlock.Lock.load(lock), tokenizer, asked), indent=1))


def frontier(model: Any, lock: fastlock.Lock, tokenizer: Any, asked: Prompts) -> list[dict[str, float]]:
    """What is measured at each strength."""
    rows = []
    for strength in STRENGTHS:
        with fastlock.relocked(model, lock, strength):
            found = fastlock.evaluate(model, tokenizer, asked, new_tokens=NEW_TOKENS, batch_size=BATCH)[0]
        rows.append({"strength": strength} | {name: getattr(found, name) for name in MEASURES})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def report(seeds: int, asked: Prompts) -> None:
    """The means over the seeds, and each run."""
    say(f"Asked: {len(asked.harmful)} harmful requests, {len(asked.harmless)} harmless ones. {seeds} seeds.")
    say("One lock a seed; the mean over the seeds, and half its 95 % interval.")
    means = PrintedTable(COLUMNS)
    for on in ("own", "unseen"):
        runs = [json.loads(path.read_text()) for path in sorted(KEPT.glob(f"*-{on}-*.json"))[:seeds]]
        for i, strength in enumerate(STRENGTHS):
            refused, over = ([run[i][name] for run in runs] for name in MEASURES[:2])
            cost = [run[i]["perplexity"] / run[0]["perplexity"] for run in runs]
            rates = [f"{100 * mean:.1f} % ± {100 * half:.1f}" for mean, half in map(interval_of_mean, (refused, over))]
            means.row(on, f"{strength:g}", *rates, "{:.3f} ± {:.3f}".format(*interval_of_mean(cost)))
    say("Each run (seed of the lock, seed of the fine-tune): % of harmful / harmless requests refused")
    names = [path.stem for on in ("own", "unseen") for path in sorted(KEPT.glob(f"*-{on}-*.json"))]
    runs = [json.loads((KEPT / f"{name}.json").read_text()) for name in names]
    each = PrintedTable(["strength", *names])
    for i, strength in enumerate(STRENGTHS):
        rates = [f"{100 * run[i]['refusals']:.0f} / {100 * run[i]['over_refusals']:.1f}" for run in runs]
        each.row(f"{strength:g}", *rates)


if __name__ == "__main__":
    sys.exit(main())
