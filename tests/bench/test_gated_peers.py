"""The table of what a user would pick instead of a lock, and how strongly it steers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.efficacy import gated_peers
from bench.efficacy.gated_cells import Asked, Counts
from bench.efficacy.gated_peers import Peer, Peers, markdown, measure, score
from bench.lib.journal import Journal

ASKED = {"harmful": 10, "harmless": 4, "scary": 4}


def counts(harmful: int, harmless: int = 0, scary: int = 0) -> Counts:
    return Counts({"harmful": harmful, "harmless": harmless, "scary": scary}, ASKED, 10.0, [], [], 0.0)


def test_a_strength_is_better_that_refuses_more_of_what_is_harmful_and_less_of_the_rest() -> None:
    assert score({"harmful": 9, "harmless": 1, "scary": 3}, ASKED) == pytest.approx(0.9 - 0.5)
    assert score({"harmful": 6, "harmless": 0, "scary": 0}, ASKED) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("answers", "strengths"),
    [
        ([counts(3), counts(9, 1), counts(10, 4, 4)], [0.1, 0.2, 0.4, 0.2]),
        ([counts(9, 4, 4), counts(10, 8, 8), counts(9, 1), counts(2)], [0.1, 0.2, 0.05, 0.025, 0.05]),
        ([counts(9), counts(9), counts(9)], [0.1, 0.2, 0.05, 0.1]),
    ],
)
def test_the_strength_is_doubled_or_halved_for_as_long_as_that_is_better(
    answers: list[Any], strengths: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(answers)
    tried: list[float] = []

    def steered(_self: Peers, name: str, strength: float) -> Peer:
        tried.append(strength)
        return Peer(f"{name} at {strength}", "", lambda _model: nullcontext())

    monkeypatch.setattr(Peers, "steered", steered)
    monkeypatch.setattr(gated_peers, "counted", lambda *_: next(said))
    monkeypatch.setattr(gated_peers, "STEERING", {"CAST": 0.1})
    bench: Any = SimpleNamespace(base=None, tokenizer=None, fine_tune=lambda *_: None, lock=lambda _: None)
    assert Peers(bench).all()[-1].name == f"CAST at {strengths[-1]}"
    assert tried == strengths


def test_each_peer_has_its_rates_and_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts: list[str] = []

    def peer(name: str, **how: Any) -> Peer:
        return Peer(name, f"what {name} needs", lambda _model: acts.append(name) or nullcontext(), **how)

    monkeypatch.setattr(gated_peers, "counted", lambda *_: counts(7, 1, 2))
    monkeypatch.setattr(gated_peers.gated, "KEPT", tmp_path)
    for kind in ("obedient", "obedient-full"):
        (tmp_path / f"{kind}-0").mkdir()
        (tmp_path / f"{kind}-0" / "model.safetensors").write_bytes(b"a" * 1234)
    journal = Journal(tmp_path / "peers.jsonl", {}, {"date": "today"})
    bench: Any = SimpleNamespace(tokenizer=None, fine_tune=lambda *_: None)
    loras, stack, weights = (
        peer("for LoRAs", only_loras=True),
        peer("in the stack", writes=lambda _directory: 0),
        peer("weights"),
    )
    for kind in ("obedient", "obedient-full"):
        journal.add({"kind": kind, "seed": 0, "lock": "none"} | counts(1).to_dict())
        for one in (loras, stack, weights, weights):
            measure(bench, journal, kind, 0, one, Asked())
    assert acts == ["for LoRAs", "in the stack", "weights", "in the stack", "weights"]
    text = markdown(journal.path)
    for line in (
        "| 1,234 | what for LoRAs needs |",
        "| 0 | what in the stack needs |",
        "| 1,234 | what weights needs |",
    ):
        assert line in text
    assert "| obedient-full | weights | 1 | 7 of 10: 70.0%" in text
    assert "date: today" in text
