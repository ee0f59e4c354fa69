"""How the kinds of the fold kernel are estimated, told and counted; they are timed on a GPU alone."""

from pathlib import Path

import pytest

from bench.lib import fold_model
from bench.lib.fold_model import Gpu, Launched, seconds
from bench.ops import fold_report
from bench.ops.fold_counters import counters
from bench.ops.fold_counters_report import REPORT as COUNTERS
from fastlock.kernels.fold.variants import KINDS

DOCS = Path(__file__).parents[2] / "docs" / "fold-kernel.md"
# A round number for each, in seconds and bytes.
GPU = Gpu(bandwidth=1e9, latency=1e-3, near=1e-4, start=1e-2, instructions=1e-5, multiprocessors=2)


def test_one_program_waits_for_its_row_and_for_its_heads() -> None:
    """Worked out by hand: 1000 bytes a head take 1 µs of memory's time."""
    one = Launched(programs=1, rows=32, bytes_a_head=1000)
    row, head, own = 1e-3, 1e-6 + 1e-3, 1e-5
    assert seconds([1], 32, one, GPU) == pytest.approx(1e-2 + row + head + own)
    assert seconds([3], 32, one, GPU) == pytest.approx(1e-2 + row + 3 * (head + own))
    pairs = Launched(programs=1, rows=32, bytes_a_head=1000, together=2)
    assert seconds([3], 32, pairs, GPU) == pytest.approx(1e-2 + row + (head + 1e-6 + 2 * own) + (head + own))
    staged = Launched(programs=1, rows=32, bytes_a_head=1000, ahead=2)
    assert seconds([2], 32, staged, GPU) == pytest.approx(1e-2 + row + head + 2 * own, rel=1e-4)
    before = Launched(programs=1, rows=32, bytes_a_head=1000, table_loads=3)
    assert seconds([1], 32, before, GPU) == pytest.approx(1e-2 + 3 * row + head + own)


def test_memory_bounds_what_many_programs_reach() -> None:
    """However many are under way, it moves no more than its bandwidth; and with few it waits."""
    many, few = (Launched(programs, rows=32, bytes_a_head=100_000) for programs in (64, 1))
    floor = 1000 * 100_000 / 1e9
    assert floor < seconds([1] * 1000, 32, many, GPU) < 1.2 * floor + 2e-2
    assert seconds([1] * 1000, 32, few, GPU) > 5 * floor


def test_heavy_sites_last_are_a_longer_tail() -> None:
    heads = [1] * 40 + [8]
    first, last = (Launched(2, 32, 1000, heavy_first=heavy_first) for heavy_first in (True, False))
    assert seconds(heads, 32, first, GPU) < seconds(heads, 32, last, GPU)


@pytest.fixture(scope="module")
def estimates() -> list[fold_model.Estimates]:
    return [fold_model.estimates(latency) for latency in (Gpu.latency, fold_model.SLOW)]


def test_the_documentation_has_the_models_estimates(estimates) -> None:
    """All but the last column, which is for what was measured."""
    told = [line.rpartition("|")[0].rpartition("|")[0] for line in DOCS.read_text().splitlines() if "|" in line]
    for line in fold_model.lines(*estimates)[2:-1]:
        assert line.rpartition("|")[0].rpartition("|")[0] in told
    assert all(f"| `{kind}` |" in DOCS.read_text() for kind in KINDS)


def test_the_default_is_the_models_choice_until_one_is_measured(estimates) -> None:
    """As documented: in every line the fastest, or within a percent of it. Once measured, this test can go."""
    assert "not measured on a GPU" in DOCS.read_text(), "measured: the default need not be the model's any more"
    for found in estimates:
        for name, models in fold_model.WORKLOADS:
            of_kinds = {kind: found[name, models, kind] for kind in KINDS}
            assert of_kinds["staged"] <= 1.01 * min(of_kinds.values())


def row(kind: str, device: list[float] | None, graph: list[float] | None) -> dict:
    shared = {"shape": "8B", "models": 1, "default": "staged", "bytes": 25e6, "copy_bytes_per_second": 4e12}
    shared |= {"matches": True, "error_in_bounds": 0.5, "path": "kind", "warm": False, "model_seconds": 8.3e-6}
    times = {"device_seconds": device, "events_seconds": [1e-6, 1e-6, 1e-6], "graph_seconds": graph}
    return shared | times | {"kind": kind}


def test_kinds_are_told_beside_the_model() -> None:
    rows = [row("staged", [1.2e-5] * 3, [1e-5] * 3), row("lean", None, None), row("pairs", [1e-5] * 3, [8e-6] * 3)]
    section = fold_report.section(rows)
    (staged,) = [line for line in section if line.startswith("| 8B × 1 | staged (default)")]
    assert [cell.strip() for cell in staged.split("|")[3:9]] == [
        "8.3 µs",
        "12 µs (12 µs–12 µs)",
        "1 µs (1 µs–1 µs)",
        "11 µs",
        "10 µs (10 µs–10 µs)",
        "62%",
    ]
    (lean,) = [line for line in section if "| lean |" in line]
    assert lean.count("not measured") == 3
    (told,) = fold_report.headline(rows)
    assert told == "fastest kinds, of copy: 8B x 1 pairs 8 µs, 78% (default staged 10 µs)"


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","dram__bytes_read.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","sm__inst_issued.avg.pct_of_peak_sustained_active",\
"sm__warps_active.avg.pct_of_peak_sustained_active"
"","","Mbyte","%","us","register/thread","%","%"
"0","fold_kernel","26.25","61.5","8.96","40","21.5","70.25"
"1","fold_kernel","1,605.5","95.5","390.0","48","30","60"
"""


def test_what_ncu_counted_is_read() -> None:
    one, many = counters(NCU)
    assert one == pytest.approx(
        {
            "seconds": 8.96e-6,
            "dram_bytes": 26.25e6,
            "dram_percent": 61.5,
            "warps_percent": 70.25,
            "issue_percent": 21.5,
            "registers": 40,
        }
    )
    assert (many["dram_bytes"], many["seconds"]) == pytest.approx((1605.5e6, 390e-6))
    section = COUNTERS.section([one | {"shape": "8B", "models": 1, "kind": "staged", "bytes": 25e6}])
    assert "| 8B × 1 | staged | 8.96 µs | 105% | 62% | 70% | 22% | 40 |" in section
