"""What extraction takes, and what of it the probes are: `python -m bench.efficacy.extract`.

It prints Markdown, and needs what `make demo` sets up. SmolLM2-135M-Instruct reads the shipped pairs, in batches and
one text at a time; the same activations are then scored by scikit-learn, as it comes and taken to the end.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression

import fastlock
from bench.lib import machine

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
extraction: Any = importlib.import_module("fastlock.recipes.extraction")  # fastlock.extract is the function

RUNS = 3
SOLVERS = {
    "scikit-learn's default (lbfgs, tol 1e-4)": {"max_iter": 1000},
    "scikit-learn to the end (newton-cholesky, tol 1e-10)": {"solver": "newton-cholesky", "tol": 1e-10},
}


def main() -> None:
    import demo

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = demo.load()
    for key, value in {**machine.describe(), "threads": torch.get_num_threads()}.items():
        print(f"- {key}: {value}")
    print("- command: python -m bench.efficacy.extract\n")
    print("| | reading | probes, directions and scales | share |\n|---|---|---|---|")
    for name, tokens in (("one text at a time", 1), ("in batches", 1024)):
        with mock.patch("fastlock.recipes.activations.BATCH_TOKENS", tokens):
            runs = [timed(model, tokenizer) for _ in range(RUNS)]
        reading, scoring = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
        print(f"| {name} | {reading:.1f} s | {scoring:.2f} s | {scoring / reading:.1%} |", flush=True)
    compare(model, tokenizer)


def timed(model: Any, tokenizer: Any) -> tuple[float, float]:
    """Seconds of both loops."""
    seconds = []

    def progress(items: Sequence[Any], _description: str) -> Iterable[Any]:
        start = time.perf_counter()
        yield from items
        seconds.append(time.perf_counter() - start)

    extraction.rank_heads(model, tokenizer, fastlock.shipped_pairs(), progress=progress)
    return seconds[0], seconds[1]


def compare(model: Any, tokenizer: Any) -> None:
    """The scores of the same activations by scikit-learn."""
    with mock.patch.object(extraction, "statistics", wraps=extraction.statistics) as spied:
        found: dict[str, Any] = {}

        def keep(activations: Any, safe: Any, train: Any, *others: Any) -> Any:
            found.update(x=activations.read(slice(None), slice(None)).astype(np.float64), safe=safe, train=train)
            return mock.DEFAULT

        spied.side_effect = keep
        scores = extraction.rank_heads(model, tokenizer, fastlock.shipped_pairs()).scores
    print(
        "\n| solver | seconds | heads with another score | at most | the same of the best 24 |\n|---|---|---|---|---|"
    )
    for name, options in SOLVERS.items():
        start = time.perf_counter()
        other = np.array([[score(x, found["safe"], found["train"], options) for x in layer] for layer in found["x"]])
        seconds, differing = time.perf_counter() - start, int((other != scores).sum())
        same = len(best(other) & best(scores))
        of = f"{differing} of {scores.size} | {np.abs(other - scores).max():.3f} | {same}"
        print(f"| {name} | {seconds:.1f} | {of} |", flush=True)


def score(x: Any, safe: Any, train: Any, options: dict[str, Any]) -> float:
    probe = LogisticRegression(**options).fit(x[train], safe[train])
    return float(probe.score(x[train], safe[train]) + probe.score(x[~train], safe[~train])) / 2


def best(scores: Any) -> set[int]:
    return set(np.argsort(-scores, axis=None, kind="stable")[:24].tolist())


if __name__ == "__main__":
    main()
