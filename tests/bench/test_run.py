"""`bench/run.py` on a registry of its own: what fails, dies or hangs costs only itself, and the report says why."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import run
from bench.lib.recording import read_records
from bench.lib.report import Report, printed_section
from bench.registry import BENCH, Benchmark

REPOSITORY = Path(__file__).parents[2]

PASSES = """
def test_one(record_property):
    record_property("row", {"number": 1})

def test_two(record_property):
    record_property("row", {"number": 2})
"""
FAILS = """
def test_measured_before(record_property):
    record_property("row", {"number": 3})

def test_wrong():
    assert not "the sums", "they are off by one"
"""
DIES = """
import os, signal

def test_measured_before(record_property):
    record_property("row", {"number": 4})

def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Its child has an output of its own, so that nothing but the signal ends it.
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
pathlib.Path(__file__).with_suffix(".pid").write_text(str(child.pid))
print("about to hang", flush=True)
time.sleep(600)
"""
# What an earlier step left can be read while a later one runs.
READS = """
import json, pathlib
from bench.lib.printed import PrintedTable, say
(path,) = pathlib.Path(__file__).parent.glob("results/*.json")
say("Before me:")
table = PrintedTable(["step", "failed"])
for step in json.loads(path.read_text())["steps"]:
    table.row(step["step"], str(step["failed"]))
"""
NOT_PYTHON = "def test_("


def told(rows: list) -> list[str]:
    return ["## Numbers", "", *(f"- {row['number']}" for row in rows), ""]


def cannot_be_told(rows: list) -> list[str]:
    raise KeyError("seconds")


@pytest.fixture
def stubs(tmp_path, monkeypatch) -> list[Benchmark]:
    """A step of each kind; scripts are modules of tmp_path, as those of bench are of the repository."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    texts = {"passes": PASSES, "fails": FAILS, "dies": DIES, "hangs": HANGS, "broken": NOT_PYTHON, "reads": READS}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)

    def stub(name: str, limit: int = 300, **how) -> Benchmark:
        file = f"{name}.py" if how.get("script") else str(tmp_path / f"{name}.py")
        return Benchmark(name, "a stub", (file,), cpu=limit, cuda=limit, part_of=(BENCH,), **how)

    return [
        stub("passes", report=Report(told)),
        stub("fails", report=Report(cannot_be_told, headline=cannot_be_told)),
        stub("hangs", limit=5, script=True),
        stub("dies", report=Report(told)),
        stub("broken"),
        stub("reads", script=True, report=Report(printed_section("What was read"))),
    ]


def test_what_fails_costs_only_itself(stubs, tmp_path, capfd) -> None:
    assert run.main(["--out", str(tmp_path / "results")], stubs, tmp_path / "work") == 1
    (path,) = (tmp_path / "results").glob("*.json")
    data, report = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    counts = {step["step"]: (step["passed"], step["failed"]) for step in data["steps"]}
    expected = {"passes": (2, 0), "fails": (1, 1), "hangs": (0, 1), "dies": (1, 1), "broken": (0, 1), "reads": (1, 0)}
    assert counts == expected
    assert data["unfinished"] == 0
    rows = {name: [row["number"] for row in rows] for name, rows in data["rows"].items() if name != "reads"}
    assert rows == {"passes": [1, 2], "fails": [3], "dies": [4]}, "what was measured before is kept"
    problems = {step["step"]: "\n".join(step["problems"]) for step in data["steps"]}
    assert "test_wrong" in problems["fails"]
    assert "they are off by one" in problems["fails"]
    assert problems["hangs"] == "cut off after 5 s: about to hang"
    assert "ended with code -9 in " in problems["dies"]
    assert "test_killed" in problems["dies"]
    assert "SyntaxError" in problems["broken"]
    assert all(problem in report for problem in problems.values())
    assert "- 2\n" in report
    assert "KeyError('seconds')" in report, "a section that cannot be made is said, and costs only itself"
    before = [row["cells"] for row in data["rows"]["reads"] if "cells" in row]
    assert before == [[name, str(failed)] for name, (_, failed) in expected.items() if name != "reads"]
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[1] for line in printed[-8:-2]] == list(expected)
    assert printed[-1] == f"Results: {path.with_suffix('')}.md and .json"


def test_nothing_of_a_step_outlives_it(stubs, tmp_path) -> None:
    run.main(["--only", "hangs", "--out", str(tmp_path / "results")], stubs, tmp_path / "work")
    child = int((tmp_path / "hangs.pid").read_text())
    for _ in range(100):  # until its new parent has taken note
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_arguments_reach_pytest_and_a_failure_is_the_exit_code(stubs, tmp_path) -> None:
    out = ["--out", str(tmp_path / "results")]
    assert run.main(["--only", "fails", *out, "--", "-k", "before"], stubs, tmp_path / "work") == 0
    (path,) = (tmp_path / "results").glob("*-fails.json")
    (step,) = json.loads(path.read_text())["steps"]
    assert (step["passed"], step["failed"]) == (1, 0)


def test_the_summary_fits_the_last_lines(stubs, tmp_path, capfd) -> None:
    """However many steps have much to tell, where the files are is on the last line."""
    chatty = Report(told, headline=lambda rows: ["much"] * 50)
    stub = Benchmark("passes", "", stubs[0].files, cpu=300, cuda=300, part_of=(BENCH,), report=chatty)
    assert run.main(["--out", str(tmp_path / "results")], [stub], tmp_path / "work") == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[-20].startswith("ok     passes: 2 passed")
    assert printed[-1].startswith("Results: ")


def test_what_needs_a_gpu_is_refused_without_one(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run.main(["--only", "parity"]) == 2
    assert "parity needs a GPU" in capsys.readouterr().err
    assert run.main(["--gpu"]) == 2


def test_it_runs_from_anywhere_and_lists_what_there_is(tmp_path) -> None:
    """Without the repository on the path, and with the current directory of another project."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(REPOSITORY / "bench" / "run.py"), "--list"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| frontier |" in done.stdout


def test_a_line_that_was_cut_off_does_not_count(tmp_path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"began": "a"}\n{"row": {"number": 1}}\n{"row": {"num')
    records = read_records(path)
    assert (records.rows, records.outcomes) == ([{"number": 1}], {"a": "began"})


@pytest.mark.slow
def test_the_cheap_benchmarks_run(tmp_path) -> None:
    """What they measure here means nothing; that they still run does."""
    only = ["--only", "host", "--only", "rows", "--out", str(tmp_path / "results")]
    assert run.main([*only, "--", "-k", "small or (planned and 1)"], work=tmp_path / "work") == 0
    (path,) = (tmp_path / "results").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["what"] for row in rows["host"]] == ["bare projections", "a model"]
    assert {row["rows"] for row in rows["rows"]} >= {1, 16, 64}
