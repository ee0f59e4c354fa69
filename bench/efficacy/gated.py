"""One lock for every fine-tune, at strength 1: how many requests are refused, over several seeds.

The base is SmolLM2-135M-Instruct taught to refuse (examples/adapters/aligned). A lock is trained on the base and on the
fine-tunes of TRAINED_ON, and tried on the base and on fine-tunes of the six kinds of tuned_models.py with other
seeds: it saw none of these, and of two kinds it saw none at all. What is asked is on topics that were never taught
(topics_asked.py), and decided nothing. Needs what `make demo` sets up. A run that was stopped is continued.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import fastlock
from bench.efficacy import gated_table, topics_asked, topics_taught, tuned_models
from bench.efficacy import tuned_prompts as made
from bench.efficacy.gated_cells import Asked, counted, questions
from bench.lib import machine
from bench.lib.journal import Journal
from bench.lib.printed import say
from bench.lib.smollm2 import load_smollm2, with_adapter
from fastlock.recipes.pairs import Pair

KEPT = tuned_models.ROOT / "build" / "gated"
# What a lock is trained on, beside the base: kinds of fine-tunes, with seeds that none has that is asked. The kind
# that is broken most needs the most training, and is there twice.
TRAINED_ON = (
    ("obedient", 1000),
    ("obedient-long", 1000),
    ("obedient-long", 1001),
    ("identity", 1000),
    ("benign", 1000),
)
SEEDS = 2
# How locks are made, by name: the arguments of train_lock, or of extract. Where the base tells harmful requests from
# harmless ones: in the upper half of its layers.
LAYERS = range(14, 30)
LOCKS: dict[str, dict[str, Any]] = {
    "gate": {"rank": 1, "layers": LAYERS, "steps": 480},
    "shorter gate": {"rank": 1, "layers": LAYERS, "steps": 320},
    "gate in 8 layers": {"rank": 1, "layers": LAYERS[8:], "steps": 480},
    "gate in 4 layers": {"rank": 1, "layers": LAYERS[12:], "steps": 480},
    "gate in 48 heads": {"rank": 1, "layers": LAYERS, "heads": 48, "steps": 480},  # of 144
    "gate and constant": {"rank": 1, "layers": LAYERS, "steps": 480, "constant": True},
    "constant": {"rank": 0, "steps": 150},
    "null-space": {"recipe": "null-space", "layers": LAYERS},
}
# What they are made from: topics that the base was taught, and those that decide, which it was not. There it is less
# sure of itself, as it is where it is asked.
HARMFUL = (*topics_asked.DECIDE_HARMFUL, *topics_taught.HARMFUL)
SCARY = (*topics_asked.DECIDE_HARMLESS, *topics_asked.DECIDE_SCARY)
HARMLESS = (*topics_taught.HARMLESS[::2], *topics_taught.SCARY[::2], *SCARY)


@dataclass(frozen=True)
class Try:
    """A lock at a strength, or "none"."""

    lock: str
    strength: float = 1.0

    @property
    def label(self) -> str:
        """As journals and tables have it: the lock's name alone at the strength that it was trained at."""
        return self.lock if self.strength == 1 else f"{self.lock} at {self.strength:g}"


class Bench:
    """The models and locks, made when they are first asked for."""

    @cached_property
    def smollm2(self) -> tuple[Any, Any]:
        return load_smollm2()

    @property
    def tokenizer(self) -> Any:
        return self.smollm2[1]

    @cached_property
    def base(self) -> Any:
        return with_adapter(copy.deepcopy(self.smollm2[0]), "aligned")

    @cached_property
    def own(self) -> tuned_models.Lessons:
        """What the base answers to the questions that benign fine-tunes teach, which is kept."""
        path = KEPT / "own.json"
        if not path.exists():
            said = tuned_models.own_answers(self.base, self.tokenizer, tuned_models.ANSWERED[::2])
            path.write_text(json.dumps(said))
        return [(question, answer) for question, answer in json.loads(path.read_text())]

    def fine_tune(self, kind: str, seed: int) -> Any:
        """A fine-tune with its adapter merged, which is kept in bfloat16, as such models are hosted; in float32."""
        path = KEPT / f"{kind}-{seed}"
        if not (path / "config.json").exists():
            tuned = tuned_models.fine_tuned(copy.deepcopy(self.base), self.tokenizer, self.own, kind, seed)
            tuned_models.merged(tuned).to(torch.bfloat16).save_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @cached_property
    def trained_on(self) -> list[Any]:
        """The fine-tunes that locks are trained on."""
        return [self.fine_tune(kind, seed) for kind, seed in TRAINED_ON]

    def lock(self, name: str) -> fastlock.Lock:
        """A lock, which is kept: of "gate-1" the first part says how it is made, and the second is its seed."""
        path = KEPT / f"{name}.safetensors"
        if not path.exists():
            how, _, seed = name.rpartition("-")
            start = time.process_time()
            self._made(LOCKS[how], int(seed)).save(path)
            print(f"{path.name}: {time.process_time() - start:.0f} s of CPU", file=sys.stderr, flush=True)
        return fastlock.Lock.load(path)

    def _made(self, how: dict[str, Any], seed: int) -> fastlock.Lock:
        begun = itertools.cycle(made.BEGUN)
        pairs = [Pair(question, made.REFUSALS[0], next(begun)) for question in made.also_framed(HARMFUL)]
        material: dict[str, Any] = {"harmless": made.also_framed(HARMLESS), "seed": seed}
        if how.get("rank", 1):  # a constant has no use for scary requests of their own
            material["scary"] = SCARY
        if "recipe" in how:
            return fastlock.extract(self.base, self.tokenizer, pairs, **material, **how)
        return fastlock.train_lock(self.base, self.trained_on, self.tokenizer, pairs, **material, **how)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="of the fine-tunes")
    parser.add_argument("--locks", nargs="*", default=["gate-0"], help=f"{', '.join(LOCKS)}, each with a seed")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0], help="of the locks: 1 is their own")
    parser.add_argument("--make-only", choices=("fine-tunes", "locks"), help="make these, and ask nothing")
    parser.add_argument("--journal", type=Path, default=KEPT / "gated.jsonl")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    KEPT.mkdir(parents=True, exist_ok=True)
    bench = Bench()
    if options.make_only == "locks":
        for name in options.locks:
            bench.lock(name)
    elif options.make_only:
        for seed in options.seeds:
            for kind in tuned_models.FINE_TUNES:
                bench.fine_tune(kind, seed)
    else:
        tries = [Try(name, strength) for name in options.locks for strength in options.strengths]
        ask(bench, options.journal, options.seeds, tries)
    return 0


def facts() -> dict[str, str]:
    """What a reader should know of the run that began a journal."""
    return {"date": datetime.date.today().isoformat(), **machine.describe()}


def ask(bench: Bench, path: Path, seeds: list[int], tries: list[Try]) -> None:
    """Add to a journal what each model does without a lock and with each of some, and print the tables."""
    settings = Asked()
    journal = Journal(path, {"asked": asdict(settings), "trained_on": TRAINED_ON}, facts())
    for seed in seeds:
        for kind in ("base", *tuned_models.FINE_TUNES):
            cells(bench, journal, kind, seed, tries, settings)
    say(gated_table.markdown(path))


def cells(bench: Bench, journal: Journal, kind: str, seed: int, tries: list[Try], settings: Asked) -> None:
    """Add what a model does without a lock, and in each try that the journal does not have yet."""
    known = {record["lock"] for record in journal.records if (record["kind"], record["seed"]) == (kind, seed)}
    wanted = [one for one in (Try("none"), *tries) if one.label not in known]
    if not wanted:
        return
    model = copy.deepcopy(bench.base) if kind == "base" else bench.fine_tune(kind, seed)
    requests = questions(settings, seed)
    for one in wanted:
        without = one.lock == "none"
        with nullcontext() if without else fastlock.relocked(model, bench.lock(one.lock), one.strength):
            counts = counted(model, bench.tokenizer, requests, settings)
        journal.add({"kind": kind, "seed": seed, "lock": one.label, **counts.to_dict()})
        print(kind, seed, one.label, counts.refused, f"{counts.perplexity:.2f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
