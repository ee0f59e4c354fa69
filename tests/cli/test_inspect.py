"""`fastlock inspect`."""

import dataclasses
import json

import fastlock
from tests.helpers.families import gated_lock, random_lock, tiny_model


def test_it_shows_a_lock_and_a_receipt(files, run) -> None:
    lock = fastlock.Lock.load(files / "lock.safetensors")
    shown = json.loads(run("inspect", files / "lock.safetensors", "--json"))
    assert shown["digest"] == lock.digest
    assert [(row["layer"], row["head"]) for row in shown["rows"]] == [(0, 3), (0, 1), (2, 2)]
    assert "tiny" in run("inspect", files / "lock.safetensors")
    assert shown["strength"] is None
    dataclasses.replace(lock, strength=1.25).save(files / "calibrated.safetensors")
    assert json.loads(run("inspect", files / "calibrated.safetensors", "--json"))["strength"] == 1.25
    assert "1.25" in run("inspect", files / "calibrated.safetensors")
    assert "not relocked" in run("inspect", files / "base")
    fastlock.relock_checkpoint(files / "base", lock, files / "locked")
    assert "model.layers.2.self_attn.o_proj" in run("inspect", files / "locked")
    assert json.loads(run("inspect", files / "locked", "--json"))["receipt"]["lock_digest"] == lock.digest


def test_a_damaged_config_is_refused(files, run) -> None:
    for text in ("{", "[1]"):
        (files / "base" / "config.json").write_text(text)
        assert "not JSON" in run("inspect", files / "base", code=3)


def test_it_cuts_nothing_off(files, run, monkeypatch) -> None:
    """In a narrow terminal, digests and names are continued in the next line."""
    lock = fastlock.Lock.load(files / "lock.safetensors")
    fastlock.relock_checkpoint(files / "base", lock, files / "locked")
    monkeypatch.setenv("COLUMNS", "40")
    for path in (files / "lock.safetensors", files / "locked"):
        printed = run("inspect", path)
        assert "…" not in printed
        columns = zip(*(line.split("│") for line in printed.splitlines() if line.count("│") == 3), strict=True)
        assert lock.digest in ["".join(cell.strip() for cell in column) for column in columns][2]
    names = [line.split("│")[3].strip() for line in printed.splitlines() if line.count("│") == 5]
    assert "model.layers.2.self_attn.o_proj" in "".join(names)


def test_names_are_not_taken_for_markup(files, run) -> None:
    random_lock(tiny_model("llama"), base_model="a\\[/b]").save(files / "odd.safetensors")
    assert "a\\[/b]" in run("inspect", files / "odd.safetensors")
    assert "a\\[/b]" in run("inspect", files / "a\\[/b]", code=3)
    (files / "base").rename(files / "[red]base")
    assert "[red]base" in run("inspect", files / "[red]base").replace("\n", "")


def test_names_cannot_command_the_terminal(files, run) -> None:
    (files / "base").rename(files / "\x1b[31mbase")
    printed = run("inspect", files / "\x1b[31mbase")
    assert "\\x1b[31mbase" in printed
    assert "\x1b" not in printed


def test_it_shows_a_gate(files, run) -> None:
    """Its rank, how many columns it rewrites, and whether there is a constant part beside it."""
    gated_lock(tiny_model("llama"), rank=5, constant=False).save(files / "gated.safetensors")
    shown = json.loads(run("inspect", files / "gated.safetensors", "--json"))
    assert (shown["gate_rank"], shown["rewritten_columns"], shown["constant"]) == (5, 3 * 32, False)
    assert "gate_rank" not in json.loads(run("inspect", files / "lock.safetensors", "--json"))
    run("relock", files / "base", "--lock", files / "gated.safetensors", "--out", files / "gated", "--for", "llama.cpp")
    receipt = json.loads(run("inspect", files / "gated", "--json"))["receipt"]
    assert (receipt["rank"], receipt["constant"]) == (5, False)
    assert receipt["written_digest"] in run("inspect", files / "gated").replace("\n", "")
