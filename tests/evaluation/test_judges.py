"""The table of judges: what a user names, and what a report calls it."""

from __future__ import annotations

import pytest

import fastlock
from fastlock.evaluation import judges
from fastlock.evaluation.judges import open_judge
from fastlock.evaluation.judging import JudgeKind
from fastlock.evaluation.keyword_judge import refuses


def test_what_a_user_names(tmp_path, monkeypatch) -> None:
    assert open_judge("keywords") is refuses
    for given, model, message in (
        ("keywords", "gpt", "only for an endpoint, and keywords is not a URL"),
        ("http://localhost:1/v1", None, "--judge-model"),
        ("no/such-model", None, "a directory here"),
        ("https://user:secret@host/v1", "m", "cannot be used"),
        ("https://host/v1?key=secret", "m", "cannot be used"),
        ("https://host:99999/v1", "m", "cannot be used"),
        ("https:///v1", "m", "cannot be used"),
        ("http://a..b/v1", "m", "cannot be used"),
        (f"http://{'a' * 70}.com/v1", "m", "cannot be used"),
        ("http://localhost/\u00e9/v1", "m", "cannot be used.*percent-encoded"),
        ("http://localhost/a b/v1", "m", "cannot be used"),
        (str(tmp_path), None, "can(no|')t be loaded"),
    ):
        with pytest.raises(fastlock.FastlockError, match=message) as error:
            open_judge(given, model)
        assert "secret" not in str(error.value)
    monkeypatch.setenv("FASTLOCK_JUDGE_API_KEY", "a\nb")
    with pytest.raises(fastlock.FastlockError, match="FASTLOCK_JUDGE_API_KEY"):
        open_judge("http://localhost/v1", "m")


def test_another_kind_of_judge_is_a_line_in_the_table(monkeypatch) -> None:
    opened: list[tuple[str, str | None]] = []

    def mine(name: str, model: str | None):
        opened.append((name, model))
        return refuses

    kind = JudgeKind(matches=lambda name: name.startswith("mine:"), open=mine, takes_model=True)
    monkeypatch.setattr(judges, "_KINDS", (kind, *judges._KINDS))
    assert open_judge("mine:1", "m") is refuses
    assert open_judge("mine:2") is refuses
    assert opened == [("mine:1", "m"), ("mine:2", None)]
    with pytest.raises(fastlock.FastlockError, match="only for an endpoint"):
        open_judge("keywords", "m")
