"""Run the benchmarks (`make bench`), with --gpu after every kernel's parity (`make gpu`); write bench/results/.

Exit codes: 0; 1 if anything failed (results are written all the same); 2 if --gpu finds no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import report

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
TESTS = BENCH.parent / "tests"
SPREAD = ["-n", "8"] if importlib.util.find_spec("xdist") else []
# Name, what pytest is to run, and the seconds it may take: 440 together, so that `make gpu` ends within 8 minutes.
PARITY = [
    ("parity", ["parity.py", *SPREAD], 80),
    ("tests/kernels/test_fold.py", [str(TESTS / "kernels" / "test_fold.py"), *SPREAD], 90),
    ("tests/test_relock.py -k devices", [str(TESTS / "test_relock.py"), "-k", "devices"], 30),
    ("tests/test_families.py", [str(TESTS / "test_families.py"), *SPREAD], 60),
]
FIRST_SECONDS = 50
BENCHMARK_SECONDS = {"cpu": 600, "cuda": 130}
CHECKPOINT_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU only: parity first, then the benchmarks")
    parser.add_argument("--only", choices=["fold", "checkpoints"], help="one of the benchmarks")
    parser.add_argument("--big", action="store_true", help="checkpoints: also of 123B parameters, 10 GB on disk")
    options = parser.parse_args()
    kind = machine.device().type
    if options.gpu and kind != "cuda":
        print("run.py --gpu: torch finds no CUDA device here. `make bench` measures on a CPU.", file=sys.stderr)
        return 2
    # `make gpu` measures the device: what checkpoints cost on disk has nothing to do with it.
    benchmarks = [options.only] if options.only else ["fold"] if options.gpu else ["fold", "checkpoints"]
    return measure(PARITY if options.gpu else [], benchmarks, kind, options.big)


def measure(parity: list[tuple[str, list[str], int]], benchmarks: list[str], kind: str, big: bool) -> int:
    """Run all steps, write the results, print the report; 1 if anything failed."""
    start = time.perf_counter()
    described = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        junit, data = Path(folder) / "junit.xml", Path(folder) / "benchmarks.json"
        steps, errors = [], []
        for name, arguments, limit in parity:
            steps.append(run_pytest(name, arguments, limit, junit))
            errors += report.parity(junit)
        rows, checkpoints, first = [], [], []
        if parity:
            steps.append(run_pytest("first relock", ["bench_first.py"], FIRST_SECONDS, junit))
            first = report.recorded(junit, "first")
        if "fold" in benchmarks:
            timing = ["bench_fold.py", f"--benchmark-json={data}"]
            timing += ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]
            steps.append(run_pytest("benchmarks", timing, BENCHMARK_SECONDS[kind], junit))
            written = data.is_file() and data.stat().st_size > 0
            rows = report.benchmarks(json.loads(data.read_text()) if written else {})
        if "checkpoints" in benchmarks:
            # As the reports of older pytest versions are: the newer ones have no place for what a test records.
            arguments = ["bench_checkpoint.py", "-o", "junit_family=xunit1", *([] if big else ["-k", "not 123b"])]
            steps.append(run_pytest("checkpoints", arguments, CHECKPOINT_SECONDS, junit))
            checkpoints = report.recorded(junit, "checkpoint")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    name = f"{re.sub(r'[^a-z0-9]+', '-', described['device'].lower()).strip('-')}-{date}"
    name += f"-{benchmarks[0]}" if len(benchmarks) == 1 and not parity else ""
    result: dict[str, Any] = {
        "date": date,
        "command": shlex.join(["python", "bench/run.py", *sys.argv[1:]]),
        "took_seconds": time.perf_counter() - start,
        "json": f"{name}.json",
        "machine": described,
        "steps": steps,
        "parity": errors,
        "first": first,
        "benchmarks": rows,
        "checkpoints": checkpoints,
    }
    RESULTS.mkdir(exist_ok=True)
    text = report.markdown(result)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
    print(f"Written: {RESULTS / name}.md and .json")
    return 1 if any(step["failed"] for step in steps) else 0


def run_pytest(name: str, arguments: list[str], limit: int, junit: Path) -> dict[str, Any]:
    """One pytest process, ended after `limit` seconds; what it came to."""
    print(f"== {name}", flush=True)
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command += [f"--benchmark-storage=file://{junit.parent}", *arguments]
    start = time.perf_counter()
    # From bench/, so that the repository's own folders are not on the path: `fastlock` is the installed one.
    process = subprocess.Popen(command, cwd=BENCH, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = interrupt(process)
    except BaseException:
        interrupt(process)
        raise
    outcome: dict[str, Any] = report.outcome(junit, name)
    if code != 0 and not outcome["failed"]:
        outcome["failed"] = 1
        outcome["not_passed"].append(f"pytest ended with code {code} after {time.perf_counter() - start:.0f} s")
    return outcome | {"took_seconds": time.perf_counter() - start}


def interrupt(process: subprocess.Popen[bytes]) -> int:
    """As by Ctrl-C, so that pytest still writes its report; then, if it does not end, all of its processes."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return -signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
