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

BENCH = Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))

from bench.lib import machine, report, roofline  # noqa: E402

RESULTS = BENCH / "results"
TESTS = BENCH.parent / "tests"
KERNEL_TESTS = ("fold", "dispatch", "locked_linear")
SPREAD = ["-n", "8"] if importlib.util.find_spec("xdist") else []
# Name, what pytest is to run, and the seconds it may take: 470 together, so that `make gpu` ends within 8 minutes.
PARITY = [
    ("parity", ["ops/parity.py", *SPREAD], 70),
    ("tests/kernels", [*(str(TESTS / "kernels" / f"test_{name}.py") for name in KERNEL_TESTS), *SPREAD], 70),
    ("tests/models/test_relocking.py -k devices", [str(TESTS / "models" / "test_relocking.py"), "-k", "devices"], 20),
    ("tests/models/test_families.py", [str(TESTS / "models" / "test_families.py"), *SPREAD], 45),
    ("compute-sanitizer", ["ops/sanitizer.py"], 45),
]
FIRST_SECONDS = 40
HOST_SECONDS = 20
ROWS_SECONDS = {"cpu": 200, "cuda": 60}
BENCHMARK_SECONDS = {"cpu": 600, "cuda": 100}
CHECKPOINT_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU only: parity first, then the benchmarks")
    parser.add_argument("--only", choices=["fold", "host", "rows", "checkpoints"], help="one of the benchmarks")
    parser.add_argument("--big", action="store_true", help="checkpoints: also of 123B parameters, 10 GB on disk")
    options = parser.parse_args()
    kind = machine.device().type
    if options.gpu and kind != "cuda":
        print("run.py --gpu: torch finds no CUDA device here. `make bench` measures on a CPU.", file=sys.stderr)
        return 2
    # `make gpu` measures the device: what checkpoints cost on disk has nothing to do with it.
    every = ["host", "rows", "fold"] if options.gpu else ["host", "rows", "fold", "checkpoints"]
    benchmarks = [options.only] if options.only else every
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
        rows, checkpoints, first, host, of_rows = [], [], [], [], []
        if parity:
            steps.append(run_pytest("first relock", ["ops/first_relock.py"], FIRST_SECONDS, junit))
            first = report.recorded(junit, "first")
        if "host" in benchmarks:
            steps.append(run_pytest("host", ["ops/host.py"], HOST_SECONDS, junit))
            host = report.recorded(junit, "host")
        if "rows" in benchmarks:
            steps.append(run_pytest("locks per request", ["ops/rows.py"], ROWS_SECONDS[kind], junit))
            of_rows = report.recorded(junit, "rows")
        if "fold" in benchmarks:
            timing = ["ops/fold.py", f"--benchmark-json={data}"]
            timing += ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]
            steps.append(run_pytest("benchmarks", timing, BENCHMARK_SECONDS[kind], junit))
            written = data.is_file() and data.stat().st_size > 0
            rows = report.benchmarks(json.loads(data.read_text()) if written else {})
        if "checkpoints" in benchmarks:
            arguments = ["disk/checkpoints.py", *([] if big else ["-k", "not 123b"])]
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
        "picture": None,
        "machine": described,
        "steps": steps,
        "parity": errors,
        "first": first,
        "host": host,
        "rows": of_rows,
        "benchmarks": rows,
        "checkpoints": checkpoints,
    }
    RESULTS.mkdir(exist_ok=True)
    if (svg := roofline.picture(rows)) is not None:
        result["picture"] = f"{name}.svg"
        (RESULTS / result["picture"]).write_text(svg)
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
    # As the reports of older pytest versions are: the newer ones have no place for what a test records.
    command += ["-o", "junit_family=xunit1", f"--benchmark-storage=file://{junit.parent}", *arguments]
    start = time.perf_counter()
    # The `fastlock` that this process finds comes first, then the repository's bench and tests.
    places = [*sys.path[1:], str(BENCH.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    process = subprocess.Popen(command, cwd=BENCH, env=environment, start_new_session=True)
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
