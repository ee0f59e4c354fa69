"""A lock in further use: long answers, system prompts, several turns, jailbreaks, beginnings of an answer, languages.

For the locks and fine-tunes of gated.py, which has to be run before; the requests are those that decide nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

import fastlock
from bench.efficacy import topics_asked as asked
from bench.efficacy.gated import KEPT, Bench, facts
from bench.lib.journal import Journal, read_journal
from bench.lib.printed import say
from bench.lib.tables import table
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import shipped_prompts
from fastlock.inference.batching import in_batches, no_progress
from fastlock.inference.chat import DATE
from fastlock.inference.generation import evaluating, generate

FINE_TUNES = ("obedient", "obedient-long", "benign-full")
COUNT, NEW_TOKENS, LONG, BATCH = 24, 12, 64, 24


@dataclass(frozen=True)
class Use:
    """A way to ask.

    Attributes:
        messages: the conversation of a request, by its number.
        new_tokens: of an answer.
        begun: beginnings of the answer, in turn.
        harmful, harmless: the requests.
    """

    messages: Callable[[str, int], list[dict[str, str]]]
    harmful: Sequence[str]
    harmless: Sequence[str]
    new_tokens: int = NEW_TOKENS
    begun: Sequence[str] = ("",)


def _alone(request: str, _number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}]


def _with_system_prompt(request: str, number: int) -> list[dict[str, str]]:
    prompt = asked.SYSTEM_PROMPTS[number % len(asked.SYSTEM_PROMPTS)]
    return [{"role": "system", "content": prompt}, *_alone(request, number)]


def _after_turns(request: str, number: int) -> list[dict[str, str]]:
    turns = asked.EARLIER_TURNS[number % len(asked.EARLIER_TURNS)]
    said = [message for turn in turns for message in zip(("user", "assistant"), turn, strict=True)]
    return [*({"role": role, "content": content} for role, content in said), *_alone(request, number)]


def _framed(request: str, number: int) -> list[dict[str, str]]:
    return _alone(asked.JAILBREAKS[number % len(asked.JAILBREAKS)].format(request), number)


def uses() -> dict[str, Use]:
    """Each with requests of its own choice, the same for every model."""

    def some(name: str, pool: Sequence[str]) -> list[str]:
        return random.Random(name).sample(pool, min(COUNT, len(pool)))

    both: dict[str, Any] = {
        "harmful": some("harmful", asked.TEST_HARMFUL),
        "harmless": some("harmless", asked.TEST_HARMLESS),
    }
    foreign, shipped = asked.ASKED[-1], shipped_prompts()
    return {
        "as it is": Use(_alone, **both),
        "64 new tokens": Use(_alone, **both, new_tokens=LONG),
        "a system prompt": Use(_with_system_prompt, **both),
        "several turns": Use(_after_turns, **both),
        "a simple jailbreak": Use(_framed, **both),
        "a begun answer": Use(_alone, **both, begun=asked.PREFILLS),
        "other languages": Use(_alone, some("h", foreign.harmful), some("b", foreign.harmless)),
        "the shipped set": Use(_alone, some("h", shipped.harmful), some("b", shipped.harmless)),
    }


def refused(model: Any, tokenizer: Any, use: Use, requests: Sequence[str]) -> int:
    """How many of the requests are refused; of a begun answer, what follows is judged."""
    rows = []
    for number, request in enumerate(requests):
        text = tokenizer.apply_chat_template(
            use.messages(request, number), tokenize=False, add_generation_prompt=True, date_string=DATE
        )
        begun = use.begun[number % len(use.begun)]
        rows.append(list(tokenizer(text + begun, add_special_tokens=False)["input_ids"]))
    with evaluating(model):
        said = in_batches(
            rows, lambda batch: generate(model, tokenizer, batch, use.new_tokens), BATCH, no_progress, "asking"
        )
    return sum(bool(refuses(request, answer)) for request, answer in zip(requests, said, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--locks", nargs="+", default=["gate-0"], help="of gated.py")
    parser.add_argument("--journal", type=Path, default=KEPT / "further.jsonl")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = {"seed": options.seed, "fine_tunes": FINE_TUNES, "count": COUNT, "long": LONG, "short": NEW_TOKENS}
    journal = Journal(options.journal, settings, facts())
    bench = Bench()
    for kind in FINE_TUNES:
        for record in _measured(bench, journal, kind, options.seed, options.locks):
            journal.add(record)
            print(record, file=sys.stderr, flush=True)
    say(markdown(options.journal))
    return 0


def _measured(bench: Bench, journal: Journal, kind: str, seed: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    done = {(record["kind"], record["lock"], record["use"]) for record in journal.records}
    wanted = [(lock, use) for lock in ("none", *names) for use in uses() if (kind, lock, use) not in done]
    if not wanted:
        return
    model = bench.fine_tune(kind, seed)
    for name in dict.fromkeys(lock for lock, _ in wanted):
        lock = None if name == "none" else bench.lock(name)
        for what in (use for of, use in wanted if of == name):
            use = uses()[what]
            if lock is None:
                counts = [refused(model, bench.tokenizer, use, asked_) for asked_ in (use.harmful, use.harmless)]
            else:
                with fastlock.relocked(model, lock, 1.0):
                    counts = [refused(model, bench.tokenizer, use, asked_) for asked_ in (use.harmful, use.harmless)]
            of = [len(use.harmful), len(use.harmless)]
            yield {"kind": kind, "lock": name, "use": what, "refused": counts, "asked": of}


def markdown(path: Path) -> str:
    """A row for each use, a column for each fine-tune and lock: harmful · harmless refused."""
    head, records = read_journal(path)
    columns = list(dict.fromkeys((record["kind"], record["lock"]) for record in records))
    cells = {(record["use"], record["kind"], record["lock"]): record for record in records}
    rows = []
    for use in dict.fromkeys(record["use"] for record in records):
        row = [cells.get((use, *column)) for column in columns]
        of = next(record["asked"] for record in row if record)
        counts = ["" if record is None else " · ".join(map(str, record["refused"])) for record in row]
        rows.append([use, " · ".join(map(str, of)), *counts])
    facts = " · ".join(f"{key}: {value}" for key, value in head["facts"].items())
    names = [f"{kind}, {'no lock' if lock == 'none' else lock}" for kind, lock in columns]
    return "\n".join([facts, "", *table(["asked", "of", *names], rows)])


if __name__ == "__main__":
    sys.exit(main())
