"""Searches that stop and resume: journals cut off, damaged, of another search, or for which there is no room."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlock
from fastlock.errors import FastlockError
from fastlock.recipes.calibration import calibrate
from tests.helpers.calibrating import PAIRS, PROMPTS, odd, small, steered
from tests.helpers.families import random_lock


def test_a_stopped_search_goes_on(tmp_path: Path) -> None:
    model, tokenizer = small()
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "journal": journal}

    def stopping(items: Any, description: str) -> Any:
        for i, item in enumerate(items):
            if description == "Trying locks" and i == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, PAIRS, trials=5, progress=stopping, **options)
    counted: list[int] = []

    def counting(items: Any, description: str) -> Any:
        counted.extend([len(items)] * (description == "Trying locks"))
        return items

    found = calibrate(model, tokenizer, PAIRS, trials=5, progress=counting, **options)
    assert (counted, len(found.trials)) == ([2], 5)
    again = calibrate(model, tokenizer, PAIRS, trials=5, **options)
    assert again.trials == found.trials
    with pytest.raises(FastlockError, match=r"journal.jsonl: it is of another search \(another length of answers\)"):
        calibrate(model, tokenizer, PAIRS, trials=5, **(options | {"new_tokens": 2}))


@pytest.mark.parametrize("stops", [[4], [0, 1, 0], [12], [3, 9]], ids=str)
def test_a_stopped_search_tries_what_it_would_have_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    """Each stop is in the middle of a trial, the last ones where Optuna goes by the earlier trials (from 10 on)."""
    model, tokenizer = small()
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "trials": 15}
    steered(monkeypatch)
    whole = calibrate(model, tokenizer, PAIRS, **options).trials
    assert len({(one.recipe, one.tokens, one.heads, one.strength) for one in whole}) == 15
    for stop in stops:
        steered(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, tokenizer, PAIRS, journal=tmp_path / "journal.jsonl", **options)
    steered(monkeypatch)
    for trials in (8, 15):  # and one that was at its end, and gets more to try
        found = calibrate(model, tokenizer, PAIRS, journal=tmp_path / "journal.jsonl", **(options | {"trials": trials}))
        assert found.trials == whole[: max(trials, sum(stops))]


def test_a_search_goes_by_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small()
    steered(monkeypatch)
    first, second = (
        calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, new_tokens=1, trials=3, seed=seed) for seed in (1, 2)
    )
    assert not {one.strength for one in first.trials} & {one.strength for one in second.trials}


def test_a_journal_that_was_cut_off_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As no room, no power or a kill leave it: before a line's end, in its middle, in the first one; zeros behind."""
    model, tokenizer = small()
    steered(monkeypatch)
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "trials": 2, "journal": journal}
    whole = calibrate(model, tokenizer, PAIRS, **options)
    written = journal.read_bytes()
    ends = [place + 1 for place, byte in enumerate(written) if byte == ord("\n")]
    assert len(ends) >= 8
    for cut in {end - back for end in ends for back in (1, 20)} | {0, 1, 15}:
        journal.write_bytes(written[:cut] + bytes(cut % 3 if cut > 15 else 0))
        found = calibrate(model, tokenizer, PAIRS, **options)
        assert (found.trials, found.chosen) == (whole.trials, whole.chosen)
        for line in journal.read_bytes().splitlines():
            json.loads(line)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_run_that_was_killed_while_it_wrote_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's own lock of the journal stays behind."""
    model, tokenizer = small()
    steered(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "journal": journal}
    calibrate(model, tokenizer, PAIRS, trials=1, **options)
    (tmp_path / "journal.jsonl.lock").symlink_to(journal)
    assert len(calibrate(model, tokenizer, PAIRS, trials=2, **options).trials) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_journal_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever line it is that is written in part: the same call goes on when there is room again."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend
    append = backend.append_logs
    model, tokenizer = small()
    steered(monkeypatch)
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "trials": 2}
    whole = calibrate(model, tokenizer, PAIRS, journal=journal, **options).trials
    lines = journal.read_bytes().count(b"\n")
    for room in range(lines):
        journal.unlink()
        left = iter([True] * room)

        def appending(self: Any, logs: Any, left: Iterator[bool] = left) -> None:
            if next(left, False):
                return append(self, logs)
            with journal.open("ab") as file:
                file.write(json.dumps(logs[0], separators=(",", ":")).encode()[:20])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(backend, "append_logs", appending)
        with pytest.raises(FastlockError, match=r"journal.jsonl: cannot be written .*No space .* run the same command"):
            calibrate(model, tokenizer, PAIRS, journal=journal, **options)
        monkeypatch.setattr(backend, "append_logs", append)
        assert calibrate(model, tokenizer, PAIRS, journal=journal, **options).trials == whole


def test_a_fault_of_the_judges_is_not_the_journals(tmp_path: Path) -> None:
    model, tokenizer = small()

    def judge(*_: str) -> bool:
        raise OSError("the judge's own")

    with pytest.raises(OSError, match="the judge's own"):
        calibrate(
            model, tokenizer, PAIRS, prompts=PROMPTS, new_tokens=1, judge=judge, journal=tmp_path / "journal.jsonl"
        )


def test_nothing_is_said_by_optuna(tmp_path: Path) -> None:
    """Of a trial that fails or is stopped: the error says it."""
    model, tokenizer = small()
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("optuna").addHandler(handler)
    try:
        for error in (KeyboardInterrupt, FastlockError):

            def judge(*_: str, error: Any = error) -> bool:
                raise error

            with pytest.raises(error):
                calibrate(
                    model,
                    tokenizer,
                    PAIRS,
                    prompts=PROMPTS,
                    new_tokens=1,
                    judge=judge,
                    journal=tmp_path / "journal.jsonl",
                )
    finally:
        logging.getLogger("optuna").removeHandler(handler)
    assert [record.getMessage() for record in said] == []


@pytest.mark.parametrize("changed", ["judge", "cost", "model"])
def test_a_journal_of_another_judge_cost_or_model_in_memory(tmp_path: Path, changed: str) -> None:
    model, tokenizer = small()
    options: dict[str, Any] = {"prompts": PROMPTS, "trials": 1, "new_tokens": 1, "journal": tmp_path / "j"}
    calibrate(model, tokenizer, PAIRS, **options)
    other: dict[str, Any] = {"judge": {"judge": odd}, "cost": {"cost": lambda *_: 1.0}, "model": {}}[changed]
    if changed == "model":
        model.model.layers[0].self_attn.o_proj.weight.data *= 2
    with pytest.raises(FastlockError, match=rf"of another search \(another {changed}"):
        calibrate(model, tokenizer, PAIRS, **options, **other)


def test_a_stopped_search_for_a_strength_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    model, tokenizer = small()
    lock = random_lock(model)
    options: dict[str, Any] = {"lock": lock, "prompts": PROMPTS, "new_tokens": 3, "judge": odd, "trials": 12}
    journal = tmp_path / "not" / "there" / "journal.jsonl"

    def stopping(items: Any, description: str) -> Iterator[Any]:
        assert description == "Trying strengths"
        yield from list(items)[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, journal=journal, progress=stopping, **options)
    resumed = calibrate(model, tokenizer, journal=journal, **options)
    assert resumed.trials == calibrate(model, tokenizer, **options).trials
    assert len(resumed.trials) == 12
    # a weaker lock of the same rows is another; its strength, which is searched, is not
    same = dataclasses.replace(lock, strength=3.0)
    assert calibrate(model, tokenizer, journal=journal, **(options | {"lock": same})).trials == resumed.trials
    written = journal.read_bytes()
    other = dataclasses.replace(lock, scales=lock.scales / 2)
    for changed, name in (({"lock": other}, "lock"), ({"lock": None}, "base, extraction set"), ({"seed": 1}, "set of")):
        with pytest.raises(FastlockError, match=rf"another search \(another {name}"):
            calibrate(model, tokenizer, journal=journal, **(options | changed))
    assert journal.read_bytes() == written
    of_base = tmp_path / "base.jsonl"
    calibrate(model, tokenizer, PAIRS, journal=of_base, prompts=PROMPTS, new_tokens=3, judge=odd, trials=1)
    with pytest.raises(FastlockError, match=r"another search \(another lock\)"):
        calibrate(model, tokenizer, journal=of_base, **options)


def test_a_model_is_another_when_its_files_are(tmp_path: Path) -> None:
    model, tokenizer = small()
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    options: dict[str, Any] = {"lock": random_lock(model), "prompts": PROMPTS, "new_tokens": 1, "trials": 1}
    options["journal"] = tmp_path / "journal.jsonl"
    calibrate(model, tokenizer, **options)
    calibrate(model, tokenizer, **options)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    with pytest.raises(FastlockError, match=r"another search \(another model\)"):
        calibrate(model, tokenizer, **options)


BEGUN = '{"op_code":0,"worker_id":"x","study_name":"calibrate","directions":[2,1,1]}\n'

TRIAL = '{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":null,"state":1,"value":null,"values":[0,0,1]}\n'


@pytest.mark.parametrize(
    "text",
    [
        *("{\n}\n", "{}\n", "[1]\n", '{"op_code":99,"worker_id":"x"}\n', "my notes", '{"op": "no end'),
        *('{"mine": 1}\n{"mine": 2}', f"{BEGUN}{BEGUN[:30]}{BEGUN}", f"{BEGUN}{BEGUN[:30]}{BEGUN}{BEGUN[:30]}"),
        *(f"{BEGUN}{TRIAL}", f"{BEGUN}\n", BEGUN + "[" * 100_000 + "\n", BEGUN.replace('"directions"', '"x"')),
    ],
    ids=lambda text: repr(text[:9]),
)
def test_a_journal_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    model, tokenizer = small()
    journal = tmp_path / "journal.jsonl"
    journal.write_text(text)
    with pytest.raises(fastlock.DamagedError, match=r"journal.jsonl: cannot be resumed .* Give another place"):
        calibrate(model, tokenizer, lock=random_lock(model), prompts=PROMPTS, new_tokens=1, journal=journal)
    assert journal.read_text() == text


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    model, tokenizer = small()
    with pytest.raises(FastlockError, match=r"pip install 'fastlock\[calibrate\]'"):
        calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, new_tokens=1)
