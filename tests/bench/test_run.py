"""`bench/run.py` on a registry of its own: what fails, dies or hangs costs only itself, and the report says why."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import run
from bench.lib import report, steps
from bench.lib.deadline import shares
from bench.lib.recording import RECORDS, read_records
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
# Its children have an output of their own, so that nothing but a signal ends them; one is no longer of its group.
LEAVES = """
import pathlib, subprocess, sys, time
quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
children = [subprocess.Popen(["sleep", "600"], start_new_session=new, **quietly) for new in (False, True)]
pathlib.Path(__file__).with_suffix(".pids").write_text(" ".join(str(child.pid) for child in children))
print("about to hang", flush=True)
"""
HANGS = LEAVES + "time.sleep(600)"
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
    texts["leaves"] = LEAVES
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
        stub("leaves", script=True),
    ]


def test_what_fails_costs_only_itself(stubs, tmp_path, capfd) -> None:
    assert run.main(["--out", str(tmp_path / "results")], stubs, tmp_path / "work") == 1
    (path,) = (tmp_path / "results").glob("*.json")
    data, report = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    counts = {step["step"]: (step["passed"], step["failed"]) for step in data["steps"]}
    expected = {"passes": (2, 0), "fails": (1, 1), "hangs": (0, 1), "dies": (1, 1), "broken": (0, 1), "reads": (1, 0)}
    expected["leaves"] = (1, 0)
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
    assert before == [[name, str(failed)] for name, (_, failed) in list(expected.items())[:5]]
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[1] for line in printed[-9:-2]] == list(expected)
    assert printed[-1] == f"Results: {path.with_suffix('')}.md and .json"


@pytest.mark.parametrize("name", ["hangs", "leaves"])
def test_nothing_of_a_step_outlives_it(stubs, tmp_path, name: str) -> None:
    """Whether it was cut off or ended by itself; nor what it started in a process group of its own."""
    run.main(["--only", name, "--out", str(tmp_path / "results")], stubs, tmp_path / "work")
    for child in map(int, (tmp_path / f"{name}.pids").read_text().split()):
        assert ended(child)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a process that is not waited for
def test_what_cannot_be_ended_is_not_waited_for(tmp_path, monkeypatch) -> None:
    """A process that waits for a driver that does not answer, say. Here nothing is ended at all."""
    monkeypatch.setattr(steps, "GRACE", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(steps.os, "killpg", lambda *_: None)
        patched.setattr(steps.os, "kill", lambda *_: None)
        patched.setattr(steps, "PROCESSES", tmp_path / "none")
        outcome = steps.run_step("stuck", ["sleep", "600"], 0.1, tmp_path)
    assert outcome.problems == ["cut off after 0 s: it printed nothing"]
    mark = f"{RECORDS}={tmp_path / 'stuck.jsonl'}".encode()
    (process,) = [int(path.name) for path in Path("/proc").glob("[0-9]*") if mark in steps._environment(int(path.name))]
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def ended(process: int) -> bool:
    """Whether it is gone, or will be once its new parent has taken note."""
    for _ in range(100):
        if not is_running(process):
            return True
        time.sleep(0.1)
    return False


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_crash_after_the_last_test_is_a_failure_that_costs_no_row(stubs, tmp_path) -> None:
    """As when a driver's library ends its process badly."""
    (tmp_path / "passes.py").write_text("import atexit, os\natexit.register(os._exit, 3)\n" + PASSES)
    assert run.main(["--only", "passes", "--out", str(tmp_path / "results")], stubs, tmp_path / "work") == 1
    (path,) = (tmp_path / "results").glob("*.json")
    data = json.loads(path.read_text())
    (step,) = data["steps"]
    assert (step["passed"], step["failed"]) == (2, 1)
    assert step["problems"][0].startswith("ended with code 3: ")
    assert [row["number"] for row in data["rows"]["passes"]] == [1, 2]


def test_a_step_that_is_skipped_says_why_in_a_line(stubs, tmp_path, capfd) -> None:
    text = "import pytest\n\ndef test_tool():\n    pytest.skip('the tool is not here')\n"
    (tmp_path / "passes.py").write_text(text)
    assert run.main(["--only", "passes", "--out", str(tmp_path / "results")], stubs, tmp_path / "work") == 0
    line = capfd.readouterr().out.splitlines()[-2]
    assert line == "ok      passes: 0 passed, 0 failed, 1 skipped - the tool is not here"


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
    assert printed[-20].startswith("ok      passes: 2 passed")
    assert printed[-1].startswith("Results: ")


def test_what_needs_a_gpu_is_refused_without_one(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = ["--out", str(tmp_path / "results")]
    assert run.main(["--only", "parity", *out], work=tmp_path / "work") == 2
    assert "parity needs a GPU" in capsys.readouterr().err
    assert run.main(["--gpu", *out], work=tmp_path / "work") == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert list((tmp_path / "results").iterdir()) == []


def test_what_does_not_fit_the_deadline_is_not_run_and_the_report_says_so(stubs, tmp_path, capfd) -> None:
    """The steps share the time: the one that hangs is cut off early, and there is none left for the last ones."""
    passes, hangs = stubs[0], stubs[2]
    never = [replace(passes, name=f"never-{i}", cpu=10_000) for i in (1, 2)]
    out = ["--within", "15", "--out", str(tmp_path / "results")]
    assert run.main(out, [hangs, *never], tmp_path / "work") == 1
    (path,) = (tmp_path / "results").glob("*.json")
    data = json.loads(path.read_text())
    assert {step["step"]: step["ran"] for step in data["steps"]} == {"hangs": True, "never-1": False, "never-2": False}
    assert data["steps"][0]["problems"][0].startswith("cut off after ")
    for step in data["steps"][1:]:
        assert (step["passed"], step["failed"]) == (0, 0)
        assert "was not run" in step["problems"][0]
        assert step["problems"][0] in path.with_suffix(".md").read_text()
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[-4:-1]] == ["FAILED  hangs", "NOT RUN never-1", "NOT RUN never-2"]


def test_steps_share_what_is_left() -> None:
    """In proportion; the last ones get nothing where not all can have half of what they want."""
    assert shares([10, 30], 40) == [10, 30]
    assert shares([10, 30], 80) == [20, 60]
    assert shares([10, 30], 20) == [5, 15]
    assert shares([10, 30], 19) == [19, 0]
    assert shares([10, 30], 4) == [0, 0]
    assert shares([10, 30, 100], -1) == [0, 0, 0]


@pytest.mark.parametrize("spent", ["all of its share", "nothing"])
def test_no_step_takes_from_the_share_of_another(spent: str) -> None:
    limits, left = [35.0, 80.0, 45.0, 120.0], 300.0
    for i in range(len(limits)):
        share = shares(limits[i:], left)[0]
        assert share >= limits[i]
        left -= share if spent == "all of its share" else 0
    assert left >= -1e-9


def test_results_that_cannot_be_written_cost_no_step(stubs, tmp_path, monkeypatch, capfd) -> None:
    real, writes = report.replace, []

    def full(path, text):
        writes.append(path)
        if len(writes) > 2:  # what is known before the first step is still written
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    monkeypatch.setattr(report, "replace", full)
    passes, reads = stubs[0], stubs[5]
    assert run.main(["--out", str(tmp_path / "results")], [passes, reads], tmp_path / "work") == 1
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[-3:-1]] == ["ok      passes", "ok      reads"]
    assert printed[-1].startswith("RESULTS NOT WRITTEN: ")
    assert "No space left on device" in printed[-1]


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_run(stubs, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run.main(["--out", str(tmp_path / "file")], stubs, tmp_path / "work") == 2
    assert "nothing can be written" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_ends_the_run_gets_the_summary_and_the_results(stubs, tmp_path, number: int) -> None:
    """And nothing of the step that was running is left."""
    program = f"""
        import sys
        from bench import run
        from bench.registry import BENCH, Benchmark
        how = {{"cpu": 300, "cuda": 300, "part_of": (BENCH,)}}
        stubs = [Benchmark("passes", "", ({str(tmp_path / "passes.py")!r},), **how)]
        stubs.append(Benchmark("hangs", "", ("hangs.py",), script=True, **how))
        sys.exit(run.main(["--out", {str(tmp_path / "results")!r}], stubs, run.Path({str(tmp_path / "work")!r})))
    """
    environment = steps.environment_of(dict(os.environ))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "hangs.pids").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        printed = process.communicate()[0].splitlines()
    assert process.returncode == 1
    assert printed[-2].startswith("ok      passes: 2 passed")
    assert printed[-1].startswith("Results: ")
    (path,) = (tmp_path / "results").glob("*.json")
    assert json.loads(path.read_text())["unfinished"] == 1
    assert all(ended(child) for child in map(int, (tmp_path / "hangs.pids").read_text().split()))


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
    assert [row["what"] for row in rows["host"]] == ["bare projections", "a model", "a model of few rows"]
    assert {row["rows"] for row in rows["rows"]} >= {1, 16, 64}
