"""What the registry promises: files that are there, names of their own, limits that fit; and how rows are told."""

import json
import re
from pathlib import Path

import pytest

from bench.lib.report import Report
from bench.registry import BENCH, BENCHMARKS, GPU, GPU_SECONDS, SPARE_SECONDS, WARM_UP

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("ops", "disk", "efficacy")
RESULTS = REPOSITORY / "bench" / "results"
# For compiling the cubins before `run.py --gpu`, on the 16 cores of a machine with a GPU.
BUILD_SECONDS = 25
# The name of a test, after a mark that says so.
NEEDS_GPU = re.compile(
    r"^@(?:needs_gpu|pytest\.mark\.skipif\([^\n]*needs a GPU[^\n]*)\n(?:@.*\n|[ )].*\n)*def (test_\w+)", re.MULTILINE
)
# Results of before there was a registry, with what are now the names of the benchmarks whose rows these are.
KEPT = ("cpu-amd-epyc-2026-11-24", "cpu-amd-epyc-2026-11-25-checkpoints", "cpu-amd-epyc-2026-11-25-host")
OLD = {"host": "host", "rows": "rows", "benchmarks": "fold", "checkpoints": "checkpoints"}


def test_every_file_is_there_and_every_benchmark_is_listed() -> None:
    listed = {file for one in BENCHMARKS for file in one.files}
    assert [file for file in listed if not (REPOSITORY / file).is_file()] == []
    measuring = {
        str(path.relative_to(REPOSITORY))
        for room in ROOMS
        for path in (REPOSITORY / "bench" / room).glob("*.py")
        if re.search(r"^def test_", path.read_text(), re.MULTILINE)
    }
    assert measuring <= listed


def test_names_are_unique_and_can_be_typed() -> None:
    names = [one.name for one in BENCHMARKS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)
    assert {"rows", "host"} <= set(names), "the documentation names them"


def test_whoever_runs_it_gives_it_time() -> None:
    for part_of, device in ((BENCH, "cpu"), (BENCH, "cuda"), (GPU, "cuda")):
        limits = [one.limit(device) for one in BENCHMARKS if part_of in one.part_of]
        assert None not in limits
        if part_of == GPU:
            assert WARM_UP.cuda + sum(limits) <= GPU_SECONDS - SPARE_SECONDS
            assert GPU_SECONDS <= 8 * 60 - BUILD_SECONDS


def test_what_matters_most_is_run_first_and_what_may_hang_last() -> None:
    names = [one.name for one in BENCHMARKS if GPU in one.part_of]
    important = [name for name in names if name in ("parity", "fold", "first-relock", "rows")]
    assert important == ["parity", "fold", "first-relock", "rows"]
    assert names.index("rows") < names.index("kernel-tests") < names.index("model-tests")
    assert (names[0], names[-1]) == ("parity", "sanitizer")
    assert not {"host", "checkpoints", "zoo"} & set(names), "they have nothing to do with a GPU"


def test_every_test_that_needs_a_gpu_is_run_there() -> None:
    """Otherwise nobody ever runs it: a CPU skips it."""
    needing = []
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        names = NEEDS_GPU.findall(path.read_text())
        needing += [(str(path.relative_to(REPOSITORY)), name) for name in names]
    assert len(needing) >= 6
    for file, name in needing:
        steps = [one for one in BENCHMARKS if GPU in one.part_of and file in one.files]
        asked = [one.arguments[1].split(" or ") if one.arguments else [""] for one in steps]
        assert any(word in name for words in asked for word in words), f"no step of make gpu runs {file}::{name}"


def test_scripts_are_one_file_each() -> None:
    for one in BENCHMARKS:
        has_tests = ["def test_" in (REPOSITORY / file).read_text() for file in one.files]
        assert has_tests == [False] if one.script else all(has_tests)


def table_lines(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize("name", KEPT)
def test_rows_are_told_as_they_were(name: str) -> None:
    """Every line of every table that was kept with older rows is made of them today."""
    path = RESULTS / f"{name}.json"
    reports: dict[str, Report | None] = {one.name: one.report for one in BENCHMARKS}
    data = json.loads(path.read_text())
    told: set[str] = set()
    for key, name in OLD.items():
        if rows := data.get(key):
            told |= table_lines("\n".join(reports[name].section(rows)))
    assert told
    assert told <= table_lines(path.with_suffix(".md").read_text())


def test_a_roofline_is_drawn_of_the_folds_rows() -> None:
    rows = json.loads((RESULTS / "cpu-amd-epyc-2026-11-24.json").read_text())["benchmarks"]
    (report,) = (one.report for one in BENCHMARKS if one.name == "fold")
    assert report.picture(rows) == (RESULTS / "cpu-amd-epyc-2026-11-24.svg").read_text()
    assert report.headline(rows)
