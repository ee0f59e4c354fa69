"""Run the benchmarks of registry.py: what `make bench` measures, with --gpu what `make gpu` does, or those of --only.

Results are written to bench/results/ as each step ends. Exit codes: 0; 1 if anything failed (the results are there all
the same); 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: the `fastlock` that is found is the installed one

from bench.lib import machine
from bench.lib.report import Done, Results
from bench.lib.steps import pytest_command, run_step, script_command
from bench.lib.tables import table
from bench.registry import BENCH, BENCHMARKS, GPU, Benchmark

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"
WORK = REPOSITORY / "build" / "bench"


def main(
    arguments: Sequence[str] | None = None, benchmarks: Sequence[Benchmark] = BENCHMARKS, work: Path = WORK
) -> int:
    """The command. What the steps print, and what they leave for the report, is in `work`."""
    options = _parser(benchmarks).parse_args(arguments)
    if options.list:
        print("\n".join(listing(benchmarks)))
        return 0
    device = machine.device().type
    if options.gpu and device != "cuda":
        print("run.py --gpu: torch finds no CUDA device here. `make bench` measures on a CPU.", file=sys.stderr)
        return 2
    part_of = GPU if options.gpu else BENCH
    chosen = [one for one in benchmarks if (one.name in options.only if options.only else part_of in one.part_of)]
    limits = {one.name: limit for one in chosen if (limit := one.limit(device)) is not None}
    for one in chosen:
        if one.name not in limits:
            print(f"run.py: {one.name} needs a GPU, and torch finds none here.", file=sys.stderr)
            return 2
    command = shlex.join(["python", "bench/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    results = new_results(options.out, command, [one.name for one in chosen] if options.only else [], len(chosen))
    for one in chosen:
        print(f"== {one.name}, at most {limits[one.name]} s; what it prints: {work / one.name}.log", flush=True)
        outcome = run_step(one.name, command_of(one, options.arguments), limits[one.name], work, one.spread)
        results.steps.append(Done(outcome, one.report))
        results.write()
    print("\n".join(results.summary()))
    return 1 if results.failed else 0


def command_of(one: Benchmark, arguments: Sequence[str]) -> list[str]:
    """What runs a benchmark."""
    arguments = [*one.arguments, *arguments]
    return script_command(one.files[0], arguments) if one.script else pytest_command(one.files, arguments, one.spread)


def listing(benchmarks: Sequence[Benchmark]) -> list[str]:
    """A table of all benchmarks."""
    rows = []
    for one in benchmarks:
        limits = ["" if limit is None else f"{limit} s" for limit in (one.cpu, one.cuda)]
        rows.append([one.name, one.measures, *limits, ", ".join(one.part_of) or "--only"])
    return table(["name", "measures", "CPU, at most", "GPU, at most", "run by"], rows)[:-1]


def new_results(out: Path, command: str, only: Sequence[str], total: int) -> Results:
    """Results without a step, named after the device, the day, and what alone is run."""
    described = machine.describe()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = re.sub(r"[^a-z0-9]+", "-", described["device"].lower()).strip("-")
    facts = {"date": date, "command": command, "machine": described}
    return Results(out, "-".join([device, date, *only]), facts, total)


def _parser(benchmarks: Sequence[Benchmark]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on a GPU only: parity first, then the benchmarks")
    names = [one.name for one in benchmarks]
    parser.add_argument("--only", action="append", default=[], choices=names, metavar="NAME", help="may be repeated")
    parser.add_argument("--list", action="store_true", help="say which there are, and run none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: bench/results)")
    parser.add_argument("arguments", nargs="*", help="after --: for pytest, or for the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
