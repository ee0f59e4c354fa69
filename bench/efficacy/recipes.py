"""Which lock brings refusals back in fine-tunes of a model, and what else would. Needs what `make demo` sets up.

SmolLM2-135M-Instruct, taught to refuse (examples/adapters/aligned), is the base; tuned_models.py makes six fine-tunes
of it, which are kept in build/models. What is asked was never taught, and is what the base gets right: the harmful
requests that it refuses and the harmless ones that it answers. It takes an hour on two cores, most of it to make the
models.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlock
from bench.efficacy import peers, tuned_models
from bench.efficacy import tuned_prompts as made
from bench.lib.printed import PrintedTable, say
from bench.lib.relocked_bytes import relocked_bytes
from bench.lib.smollm2 import load_smollm2, with_adapter
from fastlock.evaluation.prompts import Prompts, shipped_prompts
from fastlock.evaluation.report import cells
from fastlock.recipes.extraction import rank_heads

KEPT = tuned_models.ROOT / "build" / "models"
ASKED = Prompts(tuple(made.HARMFUL_TEST), tuple(made.HARMLESS_TEST), shipped_prompts().texts)
NEW_TOKENS, BATCH = 12, 50
# What the lock is trained on; it is tried on all.
REFERENCES = ("obedient", "obedient-long")
BROKEN = ("obedient", "obedient-full", "obedient-long")
COLUMNS = ("fine-tune", "what is applied", "refuses harmful", "refuses harmless", "perplexity", "seconds", "bytes")


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    build()
    tokenizer = AutoTokenizer.from_pretrained(KEPT / "base")
    base, original = load("base"), load_smollm2()[0]
    asked = what_it_gets_right(base, tokenizer)
    say(
        f"Of {len(ASKED.harmful)} harmful requests the base refuses {len(asked.harmful)}, of {len(ASKED.harmless)} "
        f"harmless ones it answers {len(asked.harmless)}: those are asked."
    )
    rankings = {
        recipe: rank_heads(base, tokenizer, fastlock.shipped_pairs(), recipe=recipe)
        for recipe in ("safetylock", "prompt-end")
    }
    agreement(rankings, tokenizer)
    trained = train(base, tokenizer)
    locks = {
        "safetylock, 24 heads": (rankings["safetylock"].lock(24), 2.0),
        "prompt-end, 24 heads": (rankings["prompt-end"].lock(24), 1.0),
        "trained, all heads": (trained, 1.0),
    }
    show = Asking(tokenizer, asked)
    show.row("(base)", "nothing", base)
    for name in tuned_models.FINE_TUNES:
        show.row(name, "nothing", load(name))
        for what, (lock, strength) in locks.items():
            with applied_lock(name, lock, strength) as (model, seconds, written):
                show.row(name, f"lock: {what}, strength {strength:g}", model, seconds, written)
        if name in BROKEN:
            unaligned = load("obedient" if name == "obedient-long" else "obedient-long")
            others(show, name, base, original, unaligned, tokenizer)
    return 0


class Asking:
    """Asks models; a row of a table for each."""

    def __init__(self, tokenizer: Any, asked: Prompts) -> None:
        self.tokenizer, self.asked = tokenizer, asked
        self.table = PrintedTable(COLUMNS)

    def row(self, name: str, what: str, model: Any, seconds: float | None = None, written: int | None = None) -> None:
        found = fastlock.evaluate(model, self.tokenizer, self.asked, new_tokens=NEW_TOKENS, batch_size=BATCH)[0]
        cost = ("" if seconds is None else f"{seconds:.3g}", "" if written is None else f"{written:,}")
        self.table.row(name, what, *cells(found)[1:4], *cost)


@contextlib.contextmanager
def applied_lock(name: str, lock: fastlock.Lock, strength: float) -> Iterator[tuple[Any, float, int]]:
    """The fine-tune relocked in memory; how long that took, and what relocking its directory writes."""
    written = relocked_bytes(KEPT / name, lock, strength)
    model = load(name)
    start = time.perf_counter()
    with fastlock.relocked(model, lock, strength):
        yield model, time.perf_counter() - start, written


def others(show: Asking, name: str, base: Any, original: Any, unaligned: Any, tokenizer: Any) -> None:
    """What a user would pick instead, on the same fine-tune; each writes the whole checkpoint."""
    refusals = [(made.HARMFUL_TRAIN[0], made.REFUSALS[0])]
    ways: dict[str, Callable[[Any], Any]] = {
        "RESTA, λ 0.5": lambda model: peers.resta(model, base, unaligned, 0.5),
        "RESTA, λ 1": lambda model: peers.resta(model, base, unaligned, 1.0),
        "LoX's term, rank 6, α 0.5": lambda model: peers.lox(model, base, original, 6, 0.5),
        "one-shot refusal fine-tuning": lambda model: tuned_models.train(
            model, tokenizer, refusals, 5, 0, tuned_models.FULL_RATE
        ),
    }
    if not tuned_models.FINE_TUNES[name].full:
        ways["Safe LoRA, τ 0.35"] = lambda model: peers.safe_lora(model, base, original, 0.35)
    size = sum(path.stat().st_size for path in (KEPT / name).glob("*.safetensors"))
    for what, change in ways.items():
        model = load(name)
        start = time.perf_counter()
        changed = change(model)
        show.row(name, what, changed, time.perf_counter() - start, size)
    model = load(name)
    layer, direction = peers.refusal_direction(base, tokenizer, made.HARMFUL_TRAIN[::5], made.HARMLESS_TRAIN[::5])
    with peers.added(model, layer, direction):
        show.row(name, f"refusal direction added by a hook in layer {layer}", model)


def what_it_gets_right(base: Any, tokenizer: Any) -> Prompts:
    found = fastlock.evaluate(base, tokenizer, ASKED, new_tokens=NEW_TOKENS, batch_size=BATCH)[0]
    return replace(
        ASKED,
        harmful=tuple(answer.prompt for answer in found.harmful if answer.refused),
        harmless=tuple(answer.prompt for answer in found.harmless if not answer.refused),
    )


def agreement(rankings: dict[str, Any], tokenizer: Any) -> None:
    """Cosines of the base's directions with those extracted from each fine-tune, over the base's best 24 heads."""
    table = PrintedTable(["fine-tune", "recipe", "median cosine", "lowest"])
    for name in tuned_models.FINE_TUNES:
        model = load(name)
        for recipe, of_base in rankings.items():
            there = rank_heads(model, tokenizer, fastlock.shipped_pairs(), recipe=recipe)
            lock = of_base.lock(24)
            rows = lock.layers.numpy(), lock.heads.numpy()
            cosines = (of_base.directions[rows] * there.directions[rows]).sum(axis=-1)
            table.row(name, recipe, f"{np.median(cosines):.3f}", f"{cosines.min():.3f}")


def train(base: Any, tokenizer: Any) -> fastlock.Lock:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        lock = fastlock.train_lock(base, [load(name) for name in REFERENCES], tokenizer)
    lock.save(KEPT / "trained.safetensors")
    say(f"The lock was trained on {' and '.join(REFERENCES)} in {time.perf_counter() - start:.0f} s.")
    return lock


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(KEPT / name).eval()


def build() -> None:
    """The base and its fine-tunes, saved; those that are there already are left."""
    wanted = [name for name in ("base", *tuned_models.FINE_TUNES) if not (KEPT / name / "config.json").exists()]
    if not wanted:
        return
    model, tokenizer = load_smollm2()
    own = tuned_models.own_answers(copy.deepcopy(model), tokenizer)
    base = with_adapter(model, "aligned")
    for name in wanted:
        tuned = base if name == "base" else tuned_models.fine_tuned(copy.deepcopy(base), tokenizer, own, name, seed=0)
        tuned_models.merged(tuned).save_pretrained(KEPT / name)
        tokenizer.save_pretrained(KEPT / name)


if __name__ == "__main__":
    sys.exit(main())
