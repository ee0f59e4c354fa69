"""What extraction takes, and how much of it the probes. Needs what `make demo` sets up.

SmolLM2-135M-Instruct reads the shipped pairs, in batches and one text at a time; the same activations are then scored
by scikit-learn, with its defaults and taken to the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import transformers
from sklearn.linear_model import LogisticRegression

import fastlock
from bench.lib.printed import PrintedTable
from bench.lib.smollm2 import load_smollm2
from fastlock.recipes import extraction
from fastlock.recipes.head_scores import statistics as statistics_of

RUNS = 3
SOLVERS: dict[str, dict[str, Any]] = {
    "scikit-learn's default (lbfgs, tol 1e-4)": {"max_iter": 1000},
    "scikit-learn to the end (newton-cholesky, tol 1e-10)": {"solver": "newton-cholesky", "tol": 1e-10},
}


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2()
    times = PrintedTable(["", "reading", "probes, directions and scales", "share"])
    for name, tokens in (("one text at a time", 1), ("in batches", 1024)):
        with mock.patch("fastlock.recipes.activations.BATCH_TOKENS", tokens):
            runs = [timed(model, tokenizer) for _ in range(RUNS)]
        reading, scoring = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
        times.row(name, f"{reading:.1f} s", f"{scoring:.2f} s", f"{scoring / reading:.1%}")
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
    kept: dict[str, Any] = {}

    def keep(activations: Any, safe: Any, train: Any, *others: Any) -> Any:
        kept.update(x=activations.read(slice(None), slice(None)).astype(np.float64), safe=safe, train=train)
        return statistics_of(activations, safe, train, *others)

    with mock.patch.object(extraction, "statistics", keep):
        scores = extraction.rank_heads(model, tokenizer, fastlock.shipped_pairs()).scores
    solvers = PrintedTable(["solver", "seconds", "heads with another score", "at most", "the same of the best 24"])
    for name, options in SOLVERS.items():
        start = time.perf_counter()
        other = np.array([[score(x, kept["safe"], kept["train"], options) for x in layer] for layer in kept["x"]])
        seconds, differing = time.perf_counter() - start, int((other != scores).sum())
        same = len(best(other) & best(scores))
        most = f"{np.abs(other - scores).max():.3f}"
        solvers.row(name, f"{seconds:.1f}", f"{differing} of {scores.size}", most, str(same))


def score(x: Any, safe: Any, train: Any, options: dict[str, Any]) -> float:
    probe = LogisticRegression(**options).fit(x[train], safe[train])
    return float(probe.score(x[train], safe[train]) + probe.score(x[~train], safe[~train])) / 2


def best(scores: Any) -> set[int]:
    return set(np.argsort(-scores, axis=None, kind="stable")[:24].tolist())


if __name__ == "__main__":
    main()
