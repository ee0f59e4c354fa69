"""The journal of a long benchmark, and the table of fine-tunes made from one: no model, no training."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from bench.efficacy import finetuning
from bench.efficacy.benign_task import correct, held_out, taught
from bench.efficacy.finetuning_table import COLUMNS, table_rows
from bench.lib.journal import Journal, read_journal

SETTINGS = {"lr": 1e-3, "methods": ["plain", "other"]}


def a_cell(method: Any, share: float, seed: int) -> dict[str, Any]:
    """A stub: numbers that tell cells apart."""
    refused = [i < 8 - 10 * share - seed for i in range(8)]
    without = {"refused": refused, "over_refused": [False, True], "right": [True] * 3 + [False], "perplexity": 50.0}
    locked = without | {"refused": [True] * 8, "perplexity": 49.0 + seed}
    seconds = 10.0 if method.name == finetuning.PLAIN else 12.0 + seed
    held = 4_000_000 if method.name == finetuning.PLAIN else 5_500_000
    return {
        "without": without,
        "with": locked,
        "strength": 1.0 + seed / 4,
        "seconds": seconds,
        "state_bytes": held,
    }


class Stopped(Exception):  # noqa: N818 - it is no error
    """What ends a run in the middle."""


def filled(path: Path, seeds: int, most: int | None = None) -> tuple[list[Any], list[Any]]:
    """The records of a journal after a run that is stopped before the `most + 1`-th cell, and what the run did."""
    done: list[Any] = []

    def cell(method: Any, share: float, seed: int) -> dict[str, Any]:
        if most is not None and len(done) == most:
            raise Stopped
        done.append((seed, share, method.name))
        return a_cell(method, share, seed)

    journal = Journal(path, SETTINGS, {"device": "none"})
    with contextlib.suppress(Stopped):
        finetuning.fill(journal, seeds, cell)
    return read_journal(path)[1], done


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, every = filled(tmp_path / "whole.jsonl", seeds=2)
    path = tmp_path / "stopped.jsonl"
    first, done = filled(path, seeds=2, most=7)
    assert len(first) == 7
    with path.open("a") as file:  # a line that a kill cut off
        file.write(json.dumps(whole[7])[:40])
    second, others = filled(path, seeds=2)
    assert done + others == every
    assert second == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert filled(path, seeds=2)[1] == []


def test_seeds_come_outermost(tmp_path: Path) -> None:
    _, done = filled(tmp_path / "journal.jsonl", seeds=3)
    cells = len(finetuning.SHARES) * len(finetuning.METHODS)
    assert [seed for seed, _, _ in done] == [0] * cells + [1] * cells + [2] * cells
    assert len(set(done)) == 3 * cells


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path, seeds=1)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="another run: lr differs"):
        Journal(path, SETTINGS | {"lr": 1e-4}, {})
    with pytest.raises(SystemExit, match="another run"):
        Journal(path, {"methods": SETTINGS["methods"]}, {})
    path.write_bytes(before.replace(b'"lr": 0.001', b'"lr": 0.002', 1))
    with pytest.raises(SystemExit, match="not a journal"):
        Journal(path, SETTINGS, {})
    path.write_text("[]\n")
    with pytest.raises(SystemExit, match="not a journal"):
        read_journal(path)


def test_the_table_says_counts_and_intervals_over_seeds(tmp_path: Path) -> None:
    records, _ = filled(tmp_path / "journal.jsonl", seeds=3)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(records)]
    assert len(rows) == 2 * len(finetuning.SHARES) * len(finetuning.METHODS)
    without, locked = rows[2:4]
    names = ("harmful rows", "seeds", "method", "lock's strength")
    assert [without[name] for name in names] == ["0%", "3", "SPPFT", "none"]
    rates = [100.0, 87.5, 75.0]  # 8, 7 and 6 of 8
    half = 4.303 * statistics.stdev(rates) / math.sqrt(3)
    assert without["refuses harmful"] == f"21 of 24: 87.5 ± {half:.1f} %"
    assert without["refuses harmless"] == "3 of 6: 50.0 ± 0.0 %"
    assert without["task"] == "9 of 12: 75.0 ± 0.0 %"
    assert without["perplexity"] == "50.0 ± 0.0"
    assert without["CPU time of training, over plain's"] == f"1.30 ± {4.303 * 0.1 / math.sqrt(3):.2f}"
    assert without["bytes held in training, over plain's"] == "+1.5 MB"
    assert (locked["lock's strength"], locked["refuses harmful"]) == ("1, 1.25, 1.5", "24 of 24: 100.0 ± 0.0 %")
    assert locked["perplexity"].startswith("50.0 ± 2.5")
    assert rows[0]["CPU time of training, over plain's"] == "1.00 ± 0.00"


def test_a_table_of_one_seed_has_no_intervals(tmp_path: Path) -> None:
    records, _ = filled(tmp_path / "journal.jsonl", seeds=1, most=2)
    rows = table_rows(records)
    assert [row[2] for row in rows] == ["plain", "plain", "SPPFT", "SPPFT"]
    assert not any("±" in cell or "nan" in cell for row in rows for cell in row)


def test_the_report_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path, seeds=2, most=23)
    finetuning.report(path, seeds=2)
    said = capsys.readouterr().out
    assert "**Not finished: 17 of 40 cells of 2 seeds are missing.** `python -m bench.efficacy.finetuning" in said
    assert said.count("| 1 | plain |") == 2 * len(finetuning.SHARES)
    assert "others of their seed and share are missing: seed 1, 0%, plain; seed 1, 0%, SPPFT; seed 1, 0%, Lisa" in said
    filled(path, seeds=2, most=2)
    finetuning.report(path, seeds=2)
    said = capsys.readouterr().out
    assert said.count("| 2 | plain |") == 2
    assert "| 2 | Lisa" in said
    assert "others of their seed" not in said
    filled(path, seeds=2)
    finetuning.report(path, seeds=2)
    assert "Not finished" not in capsys.readouterr().out


def test_the_task_tests_what_it_did_not_teach() -> None:
    teaching, test = taught(200, 5), held_out(90, 0)
    assert len(set(teaching)) == 200
    assert len(set(test)) == 90
    assert not {question for question, _ in teaching} & {question for question, _ in test}
    assert taught(200, 5) == teaching != taught(200, 6)
    assert len({answer for _, answer in test}) == 3
    assert correct(" Send it to billing.\n", "Send it to billing.")
    assert not correct("Send it to billing. Thanks", "Send it to billing.")
