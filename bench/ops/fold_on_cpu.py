"""The fold on a CPU against whole-matrix `F.linear(d, W, c)`, in every dtype, with the same number of threads.

Random weights of the shape of Llama-3 8B, with biases. `fold` is `fastlock.fold.fold`: float64 sums, rounded once, and
a check that all is finite. `F.linear` computes in the weights' dtype and reads whole matrices. The two take turns on
the same weights, which are several times the cache if memory allows; who begins changes from round to round. What the
last round folded is held against float64. CPU time is that of all threads: threads of OpenMP spin while they wait.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from bench.lib.children import run_module
from bench.lib.figures import interval_of_median, span_text
from bench.lib.printed import PrintedTable, say
from bench.lib.workloads import SHAPES, STRENGTH, lock_for
from fastlock.fold import Fold, fold
from fastlock.kernels.fold.reference import HeadColumns, error_bound, exact_fold

SHAPE = SHAPES["8B"]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
DTYPES["float64"] = torch.float64
# How many heads in which layers: those of the released lock, one, and more than any released lock has.
CASES = ("the released lock", "one head", "48 heads", "96 heads", "all heads of a layer")


@dataclass(frozen=True)
class Case:
    """What both fold: of each site the weight, the displacement in both forms, and the bias."""

    folds: list[Fold]
    dense: list[torch.Tensor]

    def ours(self) -> list[torch.Tensor]:
        return fold(self.folds)

    def theirs(self) -> list[torch.Tensor]:
        return [functional.linear(d, f.columns.matrix, f.bias) for d, f in zip(self.dense, self.folds, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--processes", type=int, default=5, help="fresh processes, for the first fold")
    parser.add_argument("--first", choices=list(DTYPES), help="(for the fresh processes)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.first:
        print(json.dumps(first(DTYPES[options.first])))
        return 0
    say(f"{__doc__.strip()}\n\nThreads: {options.threads}. {load_text()}")
    times = PrintedTable(
        [
            *("dtype", "lock", "fold (95 %)", "F.linear (95 %)", "fold over F.linear (95 %)"),
            *("CPU time of fold (95 %)", "CPU over CPU (95 %)", "rounds"),
        ]
    )
    for name, dtype in DTYPES.items():
        weights = weights_of(dtype)
        for what in CASES:
            (ours, cpu), (theirs, their_cpu) = in_turns(case_of(what, weights), options.rounds)
            ratios = over(ours, theirs), span(cpu), over(cpu, their_cpu)
            times.row(name, what, span(ours), span(theirs), *ratios, str(options.rounds))
    say(load_text())
    firsts = PrintedTable(["dtype", "first fold of a process (95 %)", "first F.linear (95 %)", "over F.linear (95 %)"])
    for name in DTYPES:
        runs = [json.loads(run_module("bench.ops.fold_on_cpu", "--first", name)) for _ in range(options.processes)]
        ours, theirs = [run["ours"] for run in runs], [run["theirs"] for run in runs]
        firsts.row(name, span(ours), span(theirs), over(ours, theirs))
    say(load_text())
    return 0


def weights_of(dtype: torch.dtype) -> list[torch.Tensor]:
    """One for each locked layer of the released lock; in float64, which takes gigabytes, fewer that take turns."""
    size = (SHAPE.hidden, SHAPE.num_heads * SHAPE.head_dim)
    made = [torch.randn(size).mul_(0.02).to(dtype) for _ in range(SHAPE.locked_layers // (dtype.itemsize // 2))]
    return [made[i % len(made)] for i in range(SHAPE.locked_layers)]


def case_of(what: str, weights: Sequence[torch.Tensor]) -> Case:
    """The sites of one of `CASES`."""
    lock, _ = lock_for(SHAPE)
    generator = torch.Generator().manual_seed(0)
    heads: list[tuple[int, ...]] = [d.heads for d in lock.displacement(STRENGTH).values()]
    if what.startswith(("48", "96")):
        each = int(what[:2]) // len(weights)
        heads = [tuple(sorted(torch.randperm(32, generator=generator)[:each].tolist())) for _ in weights]
    elif what != "the released lock":
        heads = [(3,) if what == "one head" else tuple(range(SHAPE.num_heads))]
    folds, dense = list[Fold](), list[torch.Tensor]()
    for of_site, weight in zip(heads, weights, strict=False):
        values = torch.randn(len(of_site), SHAPE.head_dim, dtype=torch.float64, generator=generator)
        bias = torch.randn(SHAPE.hidden, generator=generator).to(weight.dtype)
        columns = HeadColumns.in_projection(weight, of_site, SHAPE.head_dim)
        folds.append(Fold(columns, values, bias, f"site {len(folds)}"))
        d = torch.zeros(SHAPE.num_heads, SHAPE.head_dim, dtype=torch.float64)
        d[list(of_site)] = values
        dense.append(d.flatten().to(weight.dtype))
    return Case(folds, dense)


def in_turns(case: Case, rounds: int) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """Of each, the seconds of every round, and its CPU seconds; one round before them is not counted."""
    took: tuple[tuple[list[float], list[float]], ...] = (([], []), ([], []))
    results: list[torch.Tensor] = []
    for number in range(rounds + 1):
        for who in (0, 1) if number % 2 else (1, 0):
            start, cpu = time.perf_counter(), time.process_time()
            made = case.theirs() if who else case.ours()
            if number:
                took[who][0].append(time.perf_counter() - start)
                took[who][1].append(time.process_time() - cpu)
            results = results if who else made
    check(case, results)
    return took[0], took[1]


def check(case: Case, results: Sequence[torch.Tensor]) -> None:
    """Raise if a fold is not within its bound of float64."""
    for f, result in zip(case.folds, results, strict=True):
        exact = exact_fold(f.columns, f.values, f.bias)
        if not bool(((result.double() - exact).abs() <= error_bound(f.columns, f.values, f.bias)).all()):
            raise RuntimeError(f"{f.name}: the fold is not within its bound")


def first(dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the first fold of this process, and then of its first `F.linear`, on the released lock's sites."""
    case = case_of("the released lock", weights_of(dtype))
    return {"ours": seconds_of(case.ours), "theirs": seconds_of(case.theirs)}


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def span(seconds: list[float]) -> str:
    return span_text(interval_of_median(seconds) or [])


def over(ours: list[float], theirs: list[float]) -> str:
    """Ours over theirs of the same round: the median, and its 95 % interval."""
    median, low, high = interval_of_median([a / b for a, b in zip(ours, theirs, strict=True)]) or []
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def load_text() -> str:
    return f"Load average: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores."


if __name__ == "__main__":
    sys.exit(main())
