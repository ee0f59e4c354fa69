"""`fastlock relock`, `verify` and `unlock`: into a new directory, and in place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastlock
from fastlock.cli import output


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_whole_way(files, run) -> None:
    base, locked, lock = files / "base", files / "locked", files / "lock.safetensors"
    assert "at strength" not in run("verify", base, "--lock", lock, code=1)
    out = json.loads(run("relock", base, "--lock", lock, "--strength", "2", "--out", locked, "--json"))
    assert out["receipt"]["strength"] == 2.0
    assert json.loads(run("verify", locked, "--lock", lock, "--json"))["state"] == "locked"
    assert "locked at strength 2" in run("verify", locked, "--lock", lock)
    assert "unlocked" in run("unlock", locked, "--out", files / "back")
    assert not fastlock.verify(files / "back", fastlock.Lock.load(lock))


def test_defaults_and_json(files, run) -> None:
    lock = files / "lock.safetensors"
    out = json.loads(run("relock", files / "base", "--lock", lock, "--out", files / "locked", "--json"))
    assert out["receipt"]["strength"] == 6.0
    assert json.loads(run("unlock", files / "locked", "--out", files / "back", "--json"))["out"] == str(files / "back")


def test_in_place_asks_and_can_be_undone(files, run, monkeypatch) -> None:
    base, lock = files / "base", files / "lock.safetensors"
    before = contents(base)
    arguments = ["relock", base, "--lock", lock, "--in-place"]
    assert "not confirmed" in run(*arguments, code=2)
    assert "either --out DIR or --in-place" in run(*arguments, "--out", files / "out", code=2)
    assert "either --out DIR or --in-place" in run("unlock", base, code=2)
    assert contents(base) == before
    answers = iter(["", "n\n", "yes\n"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: next(answers), raising=False)
    for _ in range(2):
        said = run(*arguments, code=2)
        assert said.startswith(f"Change {base} itself? [y/N]: ")
        assert "not confirmed" in said
    assert contents(base) == before
    run(*arguments)
    run("verify", base, "--lock", lock)
    assert not list(answers)
    run("unlock", base, "--in-place", "--yes")
    assert contents(base) == before


def test_nobody_is_asked_where_nobody_can_answer(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: "yes\n", raising=False)
    assert not output.confirmed("Really?")


def test_copies_and_stacks(files, run) -> None:
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    options = ["--for", "transformers", "--for", " vllm, sglang", "--copy", "--json"]
    receipt = json.loads(run("relock", base, "--lock", lock, "--out", out, *options))["receipt"]
    assert receipt["lock_digest"] == fastlock.Lock.load(lock).digest
    note = json.loads((out / "config.json").read_text())["fastlock"]["carrier"]
    assert note["stacks"] == ["transformers", "vllm", "sglang"]
    assert not (out / "model-fastlock-00001-of-00001.safetensors").samefile(base / "model.safetensors")


def test_an_unknown_stack_is_refused_in_the_words_of_the_library(files, run) -> None:
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    with pytest.raises(fastlock.FastlockError, match="stacks") as error:
        fastlock.relock_checkpoint(base, fastlock.Lock.load(lock), out, stacks=("tgi",))
    assert str(error.value).startswith("'tgi' is not a serving stack that fastlock knows; give ")
    assert str(error.value).endswith(" of transformers, vllm, sglang, llama.cpp.")
    for command in (
        ["relock", base, "--out", out, "--lock", lock],
        ["relock", base, "--in-place", "--lock", lock],
        ["zoo", "relock", base, "--out", out, "--lock", lock],
        ["doctor", base],
        ["doctor"],
    ):
        for stacks in ("tgi", "vllm, tgi"):
            said = run(*command, "--for", stacks, code=2)
            assert said.endswith(f"error: argument --for: {error.value}\n")
            assert "itself?" not in said
    assert "'' is not a serving stack" in run("doctor", base, "--for", "vllm,", code=2)
    assert not out.exists()


def test_a_llama_is_relocked_without_transformers(files) -> None:
    """It takes longer to import than all the rest."""
    arguments = ["relock", "base", "--lock", "lock.safetensors", "--out", "out"]
    code = (
        "import sys; from fastlock.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' in sys.modules\n"
        "print(sorted({'transformers', 'accelerate', 'triton', 'optuna', 'ray', 'pebble'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=files)
    assert done.stdout.splitlines()[-1] == "[]"
    assert fastlock.verify(files / "out", fastlock.Lock.load(files / "lock.safetensors"))
