"""What gated.py asks of a model: each lock at each strength, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.efficacy import gated
from bench.efficacy.gated import Try
from bench.efficacy.gated_cells import Asked, Counts
from bench.lib.journal import Journal

MODEL = SimpleNamespace(strength=None)


class Bench:
    """Whose one model says how it is relocked."""

    base, tokenizer = MODEL, None

    def fine_tune(self, _kind: str, _seed: int) -> Any:
        return MODEL

    def lock(self, name: str) -> str:
        return name


@contextmanager
def relocked(model: Any, lock: str, strength: float) -> Iterator[None]:
    model.strength = lock, strength
    yield
    model.strength = None


def counted(model: Any, *_rest: object) -> Counts:
    return Counts({"harmful": 0}, {"harmful": 1}, 1.0, [], [str(model.strength)], 0.0)


def test_each_lock_is_tried_at_each_strength_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated.fastlock, "relocked", relocked)
    monkeypatch.setattr(gated, "counted", counted)
    journal = Journal(tmp_path / "tries.jsonl", {}, {})
    tries = [Try("a-0", 1.0), Try("a-0", 0.5), Try("b-0", 2.0), Try("b-0", 0.0)]
    bench: Any = Bench()
    gated.cells(bench, journal, "obedient", 3, tries[:2], Asked())
    gated.cells(bench, journal, "obedient", 3, tries, Asked())
    assert [(record["lock"], record["missed"]) for record in journal.records] == [
        ("none", ["None"]),
        ("a-0", ["('a-0', 1.0)"]),
        ("a-0 at 0.5", ["('a-0', 0.5)"]),
        ("b-0 at 2", ["('b-0', 2.0)"]),
        ("b-0 at 0", ["('b-0', 0.0)"]),
    ]
