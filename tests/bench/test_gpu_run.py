"""What `make gpu` runs, from start to finish, on a fake GPU and tiny shapes; some of its steps go wrong on purpose."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import run
from bench.registry import BENCHMARKS, GPU
from tests.helpers.fake_gpu import processes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes and their signals are POSIX's")

# A cubin that the driver refuses costs a step its tests of cubins; a process that never ends, the rest of its step; and
# a crash as a process ends, nothing of what it measured.
FAULTS = {"parity": "refused", "first-relock": "hangs", "rows": "crashes"}
# Far more than they take, but for the one that hangs.
SECONDS = {"first-relock": 45}


def run_with_faults(place: Path) -> dict:
    """What a run left, with everything it printed under `printed`, and the report under `report`."""
    tools, out = place / "tools", place / "results"
    tools.mkdir()
    shutil.copy(processes.HERE / "compute-sanitizer", tools)
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        for name, value in processes.environment(place, FAULTS).items():
            patched.setenv(name, value)
        patched.setenv("PATH", str(tools), prepend=os.pathsep)
        patched.setattr("builtins.print", lambda *words, **_how: printed.extend(" ".join(words).splitlines()))
        limits = [replace(one, cuda=SECONDS.get(one.name, 300)) for one in BENCHMARKS if GPU in one.part_of]
        arguments = ["--gpu", "--tiny", "--out", str(out), "--within", str(sum(one.cuda for one in limits) + 60)]
        code = run.main(arguments, limits, place / "work")
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()) | {
        "code": code,
        "printed": printed,
        "report": path.with_suffix(".md").read_text(),
        "path": path,
    }


def steps(data: dict) -> dict[str, dict]:
    return {step["step"]: step for step in data["steps"]}


def check_every_step_is_run_in_its_order(data) -> None:
    assert list(steps(data)) == ["warm-up", *(one.name for one in BENCHMARKS if GPU in one.part_of)]
    assert all(step["ran"] for step in data["steps"])
    assert data["unfinished"] == 0
    assert (data["code"], data["machine"]["device"]) == (1, "Fake H200")
    assert data["path"].name.startswith("fake-h200-")


def check_what_has_no_fault_passes(data) -> None:
    of_step = steps(data)
    for name in set(of_step) - set(FAULTS):
        assert of_step[name]["problems"] == []
        assert of_step[name]["failed"] == 0
        assert of_step[name]["passed"] > 0 or name == "fold-counters", "there is no ncu here"
    assert of_step["sanitizer"]["skipped"] == 0
    assert [row["matches"] for row in data["rows"]["fold"]].count(True) >= 2
    assert all(row["device"].startswith("cuda") for row in data["rows"]["fold"])
    parts = [row for row in data["rows"]["warm-up"] if "part" in row]
    assert all(row["done"] for row in parts)
    assert "by cubin" in parts[-1]["found"]


def check_a_cubin_that_the_driver_refuses_is_told_and_the_jit_goes_on(data) -> None:
    parity = steps(data)["parity"]
    assert all("[cubin-" in problem and "cuModuleLoadData" in problem for problem in parity["problems"])
    assert parity["failed"] == len(parity["problems"]) > 0
    by = {row["what"].partition(",")[0] for row in data["rows"]["parity"]}
    assert {"kernel by jit", "relock"} <= by
    assert all(row["error_in_bounds"] <= 1 for row in data["rows"]["parity"])


def check_a_process_that_never_ends_costs_its_step_alone_and_leaves_nothing(data, place) -> None:
    step = steps(data)["first-relock"]
    assert step["failed"] == 1
    assert step["problems"][0].startswith("cut off after ")
    child = place / processes.LEFT
    if step["passed"]:  # else it was cut off before
        assert data["rows"]["first-relock"][0]["way"] == "cubin"
        assert ended(int(child.read_text()))


def check_a_crash_after_everything_was_measured_is_told_and_costs_no_row(data) -> None:
    rows = steps(data)["rows"]
    assert (rows["passed"], rows["failed"]) == (1, 1)
    assert "ended with code -11" in rows["problems"][0]
    (measured,) = data["rows"]["rows"]
    assert measured["ways"]["chosen"]["error_in_bounds"] <= 1


def check_the_summary_and_the_report_say_all_of_it(data) -> None:
    summary = data["printed"][-20:]
    begins = next(i for i, line in enumerate(summary) if line.startswith("ok      warm-up:"))
    verdicts = {line.split()[1].rstrip(":"): line.split()[0] for line in summary[begins : begins + len(data["steps"])]}
    assert verdicts == {name: "FAILED" if name in FAULTS else "ok" for name in steps(data)}
    assert any(line.startswith("parity: ") and "of the bound" in line for line in summary)
    assert any(line.startswith("rows, ") for line in summary)
    assert summary[-1] == f"Results: {data['path'].with_suffix('')}.md and .json"
    headings = ["## The warm-up", "## Parity on the device", "## Locks per request", "## The first relock of a process"]
    assert all(heading in data["report"] for heading in headings)
    assert "the numbers mean nothing" in data["report"]


def ended(process: int) -> bool:
    """Whether a process is gone, or will be once its new parent took note."""
    for _ in range(50):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_all_that_make_gpu_runs(tmp_path) -> None:
    """One test, as pytest-xdist would spread several over its processes, and run everything in each."""
    processes.build(tmp_path)
    data = run_with_faults(tmp_path)
    check_every_step_is_run_in_its_order(data)
    check_what_has_no_fault_passes(data)
    check_a_cubin_that_the_driver_refuses_is_told_and_the_jit_goes_on(data)
    check_a_process_that_never_ends_costs_its_step_alone_and_leaves_nothing(data, tmp_path)
    check_a_crash_after_everything_was_measured_is_told_and_costs_no_row(data)
    check_the_summary_and_the_report_say_all_of_it(data)
