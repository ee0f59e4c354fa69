"""`fastlock inspect`."""

import dataclasses
import json

import pytest

import fastlock
from fastlock.cli.output import print_facts
from tests.helpers.adapters import config_of, save_adapter
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


def test_it_shows_an_adapter(files, run) -> None:
    """Its receipt is in a file of its own; what that says is what is shown."""
    source, out, lock = save_adapter(config_of("lora"), files / "adapter"), files / "out", files / "lock.safetensors"
    said = run("inspect", source)
    assert said == f"{source}: an adapter that is not relocked by fastlock (it holds no receipt)\n"
    kind = {"path": str(source), "kind": "adapter"}
    assert json.loads(run("inspect", source, "--json")) == {**kind, "receipt": None}
    run("relock", source, "--base", files / "base", "--lock", lock, "--out", out, "--for", "transformers")
    written = json.loads((out / "fastlock.json").read_text())
    assert json.loads(run("inspect", out, "--json")) == {"path": str(out), "kind": "adapter", "receipt": written}
    said = run("inspect", out)
    assert f"{out}: a relocked adapter" in said
    for text in ("adapter bias", str(files / "base"), fastlock.Lock.load(lock).digest, *written["written"].values()):
        assert text in said
    assert [written["sites"][i]["name"] in said for i in (0, 1)] == [True, True]
    assert "{" not in said
    written["base"]["name"] = "\x1b[31mbase"
    written["original"]["\x1b[31mname"] = written["lock_digest"]
    (out / "fastlock.json").write_text(json.dumps(written))
    assert "\x1b" not in run("inspect", out)
    (out / "fastlock.json").write_text("{}")
    assert "fastlock.json: the receipt is damaged" in run("inspect", out, code=3)


def test_a_model_with_an_adapter_beside_it_is_a_checkpoint(files, run) -> None:
    (files / "base" / "adapter_config.json").write_text("{}")
    assert "config.json holds no receipt" in run("inspect", files / "base")


def test_what_a_file_says_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts("a lock", {"base": "safe\x1b[2J\x1b]0;owned\x07", "two lines": "one\ntwo"})
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "safe\\x1b[2J\\x1b]0;owned\\x07" in printed
    assert "\\n" not in printed
