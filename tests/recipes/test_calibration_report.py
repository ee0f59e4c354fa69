"""The command that calibrates, and what it writes: the lock, the trials, the page and the picture."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import fastlock
from fastlock.cli import main as cli
from fastlock.recipes.calibration import Calibration
from fastlock.recipes.calibration_report import picture, trial_cells, trial_columns
from fastlock.recipes.measuring import Measuring
from fastlock.recipes.trials import Measurement
from tests.helpers.calibrating import PROMPTS, at, small, steered, trial
from tests.helpers.families import random_lock, tiny_model


def test_the_picture_shows_every_trial_where_it_is() -> None:
    trials = (trial(1.0, 0.0, 1.0), trial(0.0, 1.0, 3.0))
    nothing: Any = None
    svg = picture(Calibration(nothing, trials[0], trials, nothing, nothing))
    assert 'cx="74.0" cy="20.0" r="4.5" fill="rgb(61,143,209)" fill-opacity=".8"' in svg
    assert 'cx="700.0" cy="356.0" r="4.5" fill="rgb(211,43,44)" fill-opacity="0"' in svg  # costs more than it may


def test_the_table_of_trials() -> None:
    made, given = trial(1.0, 0.0, 1.0), at(0.0)
    assert dict(zip(trial_columns(made), trial_cells(made), strict=True))["recipe"] == "prompt-end"
    assert dict(zip(trial_columns(given), trial_cells(given), strict=True))["strength"] == "0 (baseline)"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `fastlock calibrate CHECKPOINT` on a tiny checkpoint, with options: what it prints."""
    model, tokenizer = small()
    model.save_pretrained(tmp_path / "CHECKPOINT")
    tokenizer.save_pretrained(tmp_path / "CHECKPOINT")
    random_lock(model).save(tmp_path / "given.safetensors")
    for kind, texts in vars(PROMPTS).items():
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*options: str, code: int = 0, kinds: Any = ("harmful", "harmless", "texts")) -> str:
        files = [part for kind in kinds for part in (f"--{kind}", f"{kind}.txt")]
        monkeypatch.setattr(sys, "argv", ["fastlock", "calibrate", "CHECKPOINT", *files, "--new-tokens", "1", *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed
        return printed.out or printed.err

    return run


def test_the_command(command: Any) -> None:
    printed = json.loads(command("--out", "OUT", "--trials", "4", "--json"))
    assert printed == json.loads(Path("OUT/calibration.json").read_text())
    assert len(printed["trials"]) == 4
    assert printed["chosen"] in printed["frontier"]
    lock = fastlock.Lock.load("OUT/lock.safetensors")
    assert (lock.digest, lock.strength) == (printed["lock"], printed["chosen"]["strength"])
    assert "<svg" in Path("OUT/calibration.html").read_text()
    picture = Path("OUT/frontier.svg").read_text()
    assert picture.count("<circle") == 5  # the trials, and the ring
    assert "<style>" in picture  # it stands alone


def planted(monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    """Stand-in measurements of a model that refuses that much as it is; of a lock best at strength 1."""

    def measure(_self: Any, _lock: Any, strength: float) -> Measurement:
        return Measurement(max(kept, min(1.0, strength)), over_refusals=0.0, cost=1 + max(0, strength - 1))

    monkeypatch.setattr(Measuring, "measure", measure)


def test_the_command_for_a_lock(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 0.0)
    assert "at strength 1\n" in command("--lock", "given.safetensors", "--out", "OUT")
    given, lock = fastlock.Lock.load("given.safetensors"), fastlock.Lock.load("OUT/lock.safetensors")
    assert (lock, lock.strength) == (given, 1.0)
    data = json.loads(Path("OUT/calibration.json").read_text())
    assert data["given lock"] == f"given.safetensors (sha256 {given.digest})"
    assert (data["lock"], data["why_no_lock"], len(data["trials"])) == (given.digest, None, 20)
    assert [one["strength"] for one in data["held_out"]] == [None, 1.0]
    assert Path("OUT/frontier.svg").read_text().count("<circle") == 21
    assert "<th>strength" in Path("OUT/calibration.html").read_text()
    assert "<th>recipe" not in Path("OUT/calibration.html").read_text()
    assert fastlock.relock(small()[0], lock).strength == 1.0


def test_the_command_writes_no_lock_where_none_is_needed(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor leaves the one that an earlier run there has chosen."""
    options = ["--lock", "given.safetensors", "--out", "OUT", "--trials", "2"]
    planted(monkeypatch, 0.0)
    command(*options)
    assert Path("OUT/lock.safetensors").exists()
    Path("OUT/journal.jsonl").unlink()
    planted(monkeypatch, 1.0)
    printed = command(*options)
    assert "This checkpoint needs no lock: without one, it refuses 100% of the harmful requests" in printed
    assert "No lock was written." in printed
    assert not Path("OUT/lock.safetensors").exists()
    assert json.loads(Path("OUT/calibration.json").read_text())["lock"] is None


def test_the_command_refuses_before_it_writes(command: Any) -> None:
    lock = ["--lock", "given.safetensors"]
    assert "--lock and --base are both given" in command(*lock, "--base", "CHECKPOINT", "--out", "OUT", code=2)
    assert "--lock and --pairs are both given" in command(*lock, "--pairs", "x.jsonl", "--out", "OUT", code=2)
    assert "--trials" in command(*lock, "--out", "OUT", "--trials", "0", code=2)
    Path("damaged.safetensors").write_bytes(Path("given.safetensors").read_bytes()[:-3])
    assert "damaged.safetensors: " in command("--lock", "damaged.safetensors", "--out", "OUT", code=cli.REFUSED)
    random_lock(tiny_model("llama", head_dim=16)).save("other.safetensors")
    assert "head_dim" in command("--lock", "other.safetensors", "--out", "OUT", code=cli.REFUSED)
    tiny_model("llama", vocab_size=4096).save_pretrained("BASE")
    assert "base: its num_layers is 3" in command("--base", "BASE", "--out", "OUT", code=cli.REFUSED)
    given = fastlock.Lock.load("given.safetensors")
    fastlock.relock_checkpoint("CHECKPOINT", given, "RELOCKED")
    Path("CHECKPOINT").rename("ORIGINAL")
    Path("RELOCKED").rename("CHECKPOINT")
    assert "is relocked" in command(*lock, "--out", "OUT", code=cli.REFUSED)
    assert not list(Path("OUT").iterdir())


@pytest.mark.parametrize("out", ["harmful.txt", "harmful.txt/deeper", "/proc/fastlock"])
def test_the_command_says_where_it_can_not_write(command: Any, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Before it loads a model."""
    monkeypatch.setattr("fastlock.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    printed = command("--lock", "given.safetensors", "--out", out, code=cli.REFUSED)
    assert printed.startswith(f"fastlock: {out}: ")
    assert "Give another directory." in printed


def test_the_command_without_texts(command: Any) -> None:
    printed = json.loads(command("--out", "OUT", "--trials", "1", "--json", kinds=("harmful", "harmless")))
    assert printed["held_out"][0]["perplexity"] > 1
    assert "prompts: both harmful and harmless" in command("--out", "NEW", code=cli.REFUSED, kinds=("harmful", "texts"))


def test_the_command_that_is_stopped_goes_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steered(monkeypatch, 2)
    options = ["--out", "OUT", "--trials", "4", "--json"]
    assert command(*options, code=130) == "stopped; run the same command again to resume\n"
    assert [path.name for path in Path("OUT").iterdir()] == ["journal.jsonl"]
    with Path("OUT/journal.jsonl").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')
    steered(monkeypatch)
    resumed = json.loads(command(*options))
    assert resumed["trials"] == json.loads(command("--out", "NEW", "--trials", "4", "--json"))["trials"]


def test_the_command_keeps_out_of_another_calibration(command: Any) -> None:
    given = fastlock.Lock.load("given.safetensors")
    dataclasses.replace(given, scales=given.scales * 2).save("other.safetensors")
    command("--lock", "given.safetensors", "--out", "OUT", "--trials", "1")
    before = {path: path.read_bytes() for path in Path("OUT").iterdir()}
    refused = {"code": cli.REFUSED}
    assert "another lock" in command("--lock", "other.safetensors", "--out", "OUT", **refused)
    assert "another base" in command("--out", "OUT", **refused)
    os.utime("CHECKPOINT/model.safetensors", (1, 1))
    assert "another model" in command("--lock", "given.safetensors", "--out", "OUT", **refused)
    assert {path: path.read_bytes() for path in Path("OUT").iterdir()} == before
    given.save("OUT/lock.safetensors")
    assert "--lock is the file that would be written" in command(
        "--lock", "OUT/lock.safetensors", "--out", "./OUT", code=2
    )
    assert fastlock.Lock.load("OUT/lock.safetensors") == given
