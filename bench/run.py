"""Run the benchmarks of registry.py: what `make bench` measures, with --gpu what `make gpu` does, or those of --only.

Results are written to bench/results/ as each step ends. Exit codes: 0; 1 if anything failed or was not run (the results
are there all the same); 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: the `fastlock` that is found is the installed one

from bench.lib.deadline import shares
from bench.lib.report import Done, Results
from bench.lib.steps import Outcome, not_run, pytest_command, run_step, script_command
from bench.lib.tables import table
from bench.registry import (
    BENCH,
    BENCHMARKS,
    GPU,
    GPU_SECONDS,
    SPARE_SECONDS,
    WARM_UP,
    WARM_UP_SECONDS,
    Benchmark,
)

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"
WORK = REPOSITORY / "build" / "bench"


def main(
    arguments: Sequence[str] | None = None, benchmarks: Sequence[Benchmark] = BENCHMARKS, work: Path = WORK
) -> int:
    """The command. What the steps print, and what they leave for the report, is in `work`."""
    started = time.monotonic()
    options = _parser(benchmarks).parse_args(arguments)
    if options.list:
        print("\n".join(listing(benchmarks)))
        return 0
    within = options.within or (GPU_SECONDS if options.gpu else math.inf)
    part_of = GPU if options.gpu else BENCH
    chosen = [one for one in benchmarks if (one.name in options.only if options.only else part_of in one.part_of)]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        plan = Plan(work, options.arguments, options.tiny, started + within)
        found = found_by_warm_up(plan) if options.gpu else found_here()
    except OSError as error:
        print(f"run.py: nothing can be written: {error}", file=sys.stderr)
        return 2
    if complaint := missing(found, chosen, options.gpu):
        print(f"run.py: {complaint}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "bench/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    results = new_results(options.out, command, found, options.only, len(chosen), options.tiny)
    with signals_interrupt():
        try:
            run_all(chosen, plan, found.device, results)
        except KeyboardInterrupt:
            print("run.py: interrupted", flush=True)
            results.interrupted = True
    print("\n".join(results.summary()), flush=True)
    return 1 if results.failed else 0


@dataclass(frozen=True)
class Plan:
    """How the steps are run.

    Attributes:
        work: for what they print and leave.
        arguments: for pytest, or for the script.
        tiny: see `bench.lib.tiny`.
        end: when all must be done, by the monotonic clock.
    """

    work: Path
    arguments: Sequence[str]
    tiny: bool
    end: float

    def run(self, one: Benchmark, limit: float) -> Outcome:
        """Run a step, as long as the limit allows."""
        print(f"== {one.name}, at most {limit:.0f} s; what it prints: {self.work / one.name}.log", flush=True)
        command = command_of(one, self.arguments, self.tiny)
        return run_step(one.name, command, limit, self.work, one.spread, self.tiny)

    @property
    def left(self) -> float:
        """The seconds that steps may still take."""
        return self.end - time.monotonic() - SPARE_SECONDS


@dataclass(frozen=True)
class Found:
    """What is known of the machine.

    Attributes:
        device: cpu or cuda.
        described: as a result says it.
        steps: the warm-up, where there was one.
    """

    device: str
    described: dict[str, str]
    steps: list[Done]


def found_here() -> Found:
    """What this process finds."""
    from bench.lib import machine  # torch, which takes seconds

    return Found(machine.device().type, machine.describe(), [])


def found_by_warm_up(plan: Plan) -> Found:
    """What a process finds that pays for all that only the first one has to; this one does not touch the GPU.

    If it tells nothing, the benchmarks still may.
    """
    outcome = plan.run(WARM_UP, min(WARM_UP_SECONDS, plan.left))
    row = next((row for row in outcome.rows if "machine" in row), None)
    steps = [Done(outcome, WARM_UP.report)]
    if row is None:
        return Found("cuda", {"device": "GPU that the warm-up did not name"}, steps)
    return Found(row["on"], row["machine"], steps)


def missing(found: Found, chosen: Sequence[Benchmark], gpu: bool) -> str:
    """What keeps these from being run here, if anything does."""
    if gpu and found.device != "cuda":
        return "--gpu: torch finds no CUDA device here. `make bench` measures on a CPU."
    names = [one.name for one in chosen if one.limit(found.device) is None]
    return f"{names[0]} needs a GPU, and torch finds none here." if names else ""


def run_all(chosen: Sequence[Benchmark], plan: Plan, device: str, results: Results) -> None:
    """Run the steps one after the other, each within its share of the time, and write the results after each."""
    results.write()
    for i, one in enumerate(chosen):
        limits = [float(other.limit(device) or 0) for other in chosen[i:]]
        limit = limits[0] if math.isinf(plan.end) else shares(limits, plan.left)[0]
        if limit > 0:
            outcome = plan.run(one, limit)
        else:
            outcome = not_run(one.name, f"{max(0, plan.left):.0f} s were left, and it may take {limits[0]:.0f} s")
        results.steps.append(Done(outcome, one.report))
        results.write()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Whoever ends this program, or hangs up, interrupts it: the step is ended too, and the summary is printed."""

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_of(one: Benchmark, arguments: Sequence[str], tiny: bool) -> list[str]:
    """What runs a benchmark."""
    arguments = [*one.arguments, *arguments]
    if one.script:
        return script_command(one.files[0], arguments)
    return pytest_command(one.files, arguments, one.spread, tiny)


def listing(benchmarks: Sequence[Benchmark]) -> list[str]:
    """A table of all benchmarks."""
    rows = []
    for one in benchmarks:
        limits = ["" if limit is None else f"{limit} s" for limit in (one.cpu, one.cuda)]
        rows.append([one.name, one.measures, *limits, ", ".join(one.part_of) or "--only"])
    return table(["name", "measures", "CPU, at most", "GPU, at most", "run by"], rows)[:-1]


def new_results(out: Path, command: str, found: Found, only: Sequence[str], total: int, tiny: bool) -> Results:
    """Results of what is known before the first step, named after the device, the day, and what alone is run."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = re.sub(r"[^a-z0-9]+", "-", found.described["device"].lower()).strip("-")
    facts = {"date": date, "command": command, "machine": found.described, "tiny": tiny}
    name = "-".join([device, date, *only, *(["tiny"] if tiny else [])])
    return Results(out, name, facts, total + len(found.steps), list(found.steps))


def _parser(benchmarks: Sequence[Benchmark]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on a GPU only: parity first, then the benchmarks")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help=f"all steps together (default: with --gpu {GPU_SECONDS})"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes: to see that it runs; the numbers mean nothing"
    )
    names = [one.name for one in benchmarks]
    parser.add_argument("--only", action="append", default=[], choices=names, metavar="NAME", help="may be repeated")
    parser.add_argument("--list", action="store_true", help="say which there are, and run none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go (default: bench/results)")
    parser.add_argument("arguments", nargs="*", help="after --: for pytest, or for the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
