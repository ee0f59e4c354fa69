"""The command: what it prints, and the exit codes that scripts go by."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import fastlock
from fastlock.cli import main as cli
from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time.launch_paths import LaunchPath
from tests.helpers.families import random_lock, tiny_model


@pytest.fixture
def files(tmp_path):
    """A checkpoint and a lock on disk."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    random_lock(model, base_model="tiny", num_layers=3).save(tmp_path / "lock.safetensors")
    return tmp_path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command as its entry point does: standard output and error, once its exit code is as expected."""

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["fastlock", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, f"{end.value.code}: {printed}"
        return printed.out or printed.err

    return run


def test_it_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastlock", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastlock {fastlock.__version__}\n"


def test_the_whole_way(files, run) -> None:
    base, locked, lock = files / "base", files / "locked", files / "lock.safetensors"
    assert "at strength" not in run("verify", base, "--lock", lock, code=cli.NOT_LOCKED)
    out = json.loads(run("relock", base, "--lock", lock, "--strength", "2", "--out", locked, "--json"))
    assert out["receipt"]["strength"] == 2.0
    assert json.loads(run("verify", locked, "--lock", lock, "--json"))["state"] == "locked"
    assert "locked at strength 2" in run("verify", locked, "--lock", lock)
    assert "unlocked" in run("unlock", locked, "--out", files / "back")
    assert not fastlock.verify(files / "back", fastlock.Lock.load(lock))


def test_inspect_shows_a_lock_and_a_receipt(files, run) -> None:
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


def test_errors_end_with_their_own_exit_code_and_reason(files, run) -> None:
    lock = files / "lock.safetensors"
    assert "does not exist" in run("inspect", files / "nothing", code=cli.REFUSED)
    assert "already exists" in run("relock", files / "base", "--lock", lock, "--out", files, code=cli.REFUSED)
    run("relock", files / "base", "--lock", lock, code=2)


def test_the_documented_exit_codes(files, run, monkeypatch) -> None:
    assert (cli.NOT_LOCKED, cli.REFUSED, cli.BROKEN) == (1, 3, 4)

    def broken(path):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "load_tokenizer", broken)
    assert "ZeroDivisionError" in run("extract", files / "base", "--out", files / "x.safetensors", code=cli.BROKEN)


def test_defaults_and_json(files, run, monkeypatch) -> None:
    lock = files / "lock.safetensors"
    out = json.loads(run("relock", files / "base", "--lock", lock, "--out", files / "locked", "--json"))
    assert out["receipt"]["strength"] == 6.0
    assert json.loads(run("unlock", files / "locked", "--out", files / "back", "--json"))["out"] == str(files / "back")
    asked = []
    monkeypatch.setattr(cli, "load_tokenizer", lambda path: None)

    def made(_model, _tokenizer, *given, recipe, harmless, work, progress):
        asked.append((*given, recipe, harmless, work))
        return fastlock.Lock.load(lock)

    monkeypatch.setattr(cli, "make_lock", made)
    (files / "harmless.txt").write_text("a\nb\n")
    extract = ["extract", files / "base", "--out", files / "new.safetensors"]
    run(*extract)
    options = ["--recipe", "prompt-end", "--harmless", files / "harmless.txt", "--work", files / "work"]
    run(*extract, "--tokens", "2", *options)
    pairs = fastlock.shipped_pairs()
    assert asked == [
        (pairs, 24, None, "safetylock", None, None),
        (pairs, 24, 2, "prompt-end", ("a", "b"), files / "work"),
    ]
    for text in ("{", "[1]"):
        (files / "base" / "config.json").write_text(text)
        assert "not JSON" in run("inspect", files / "base", code=cli.REFUSED)


def test_in_place_asks_and_can_be_undone(files, run, monkeypatch) -> None:
    base, lock = files / "base", files / "lock.safetensors"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    arguments = ["relock", base, "--lock", lock, "--in-place"]
    assert "not confirmed" in run(*arguments, code=2)
    assert "either --out DIR or --in-place" in run(*arguments, "--out", files / "out", code=2)
    assert "either --out DIR or --in-place" in run("unlock", base, code=2)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr(cli.typer, "confirm", lambda text, err: asked.append(text) or len(asked) > 1)
    assert "not confirmed" in run(*arguments, code=2)
    run(*arguments)
    assert asked == [f"Change {base} itself?"] * 2
    run("verify", base, "--lock", lock)
    run("unlock", base, "--in-place", "--yes")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_copies_and_stacks(files, run) -> None:
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    given = ["--for", "transformers", "--for", "vllm,sglang", "--copy", "--json"]
    receipt = json.loads(run("relock", base, "--lock", lock, "--out", out, *given))["receipt"]
    assert receipt["lock_digest"] == fastlock.Lock.load(lock).digest
    note = json.loads((out / "config.json").read_text())["fastlock"]["carrier"]
    assert note["stacks"] == ["transformers", "vllm", "sglang"]
    assert not (out / "model-00001-of-00001.safetensors").samefile(base / "model.safetensors")
    assert "stacks" in run("relock", base, "--lock", lock, "--out", files / "b", "--for", "tgi", code=cli.REFUSED)


def test_doctor(files, run) -> None:
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    assert "not relocked" in run("doctor", base, "--for", "vllm", code=cli.NOT_LOCKED)
    run("relock", base, "--lock", lock, "--out", out)
    assert "vllm uses the biases of all 2 locked layers" in run("doctor", out, "--for", "vllm")
    found = json.loads(run("doctor", out, "--json"))["stacks"]
    assert [(finding["stack"], finding["acts"]) for finding in found] == [("transformers", True), ("vllm", True)]


def test_doctor_of_the_machine(run, monkeypatch) -> None:
    paths = [
        LaunchPath("cuda:0, H100 [x]", "jit", "Triton compiles on the first launch: this installation has no cubins"),
        LaunchPath("CPU", "reference", "plain PyTorch"),
    ]
    monkeypatch.setattr(cli, "launch_paths", lambda: paths)
    said = run("doctor").splitlines()
    assert said[0] == "cuda:0, H100 [x]: jit (Triton compiles on the first launch: this installation has no cubins)"
    assert len(said) == 2
    devices = json.loads(run("doctor", "--json"))["devices"]
    assert [(device["path"], device["reason"]) for device in devices] == [(path.path, path.reason) for path in paths]
    assert "name one" in run("doctor", "--for", "vllm", code=2)


def test_negative_strength_is_refused(files, run) -> None:
    arguments = ["relock", files / "base", "--lock", files / "lock.safetensors", "--out", files / "out"]
    assert "negative strength" in run(*arguments, "--strength", "-2", code=cli.REFUSED)
    assert not (files / "out").exists()


def test_extract(files, run, monkeypatch) -> None:
    """The command's own part: it loads, reads the pairs, and writes what `extract` makes."""
    made = fastlock.Lock.load(files / "lock.safetensors")
    asked = []
    monkeypatch.setattr(cli, "load_tokenizer", lambda path: "a tokenizer")
    monkeypatch.setattr(cli, "make_lock", lambda *given, **_: asked.append(given) or made)
    pairs = files / "pairs.jsonl"
    pairs.write_text('{"question": "a?", "safe": "no", "unsafe": "yes"}\n')
    run("extract", files / "base", "--pairs", pairs, "--out", files / "new.safetensors", "--heads", "3", "--json")
    (_, tokenizer, given_pairs, heads, tokens) = asked[0]
    assert (tokenizer, given_pairs, heads, tokens) == ("a tokenizer", fastlock.load_pairs(pairs), 3, None)
    assert fastlock.Lock.load(files / "new.safetensors") == made


def test_calibrate(files, run, monkeypatch) -> None:
    """The command's own part: what it loads and asks for, of a base and of a lock."""
    asked = []
    monkeypatch.setattr(cli, "load_tokenizer", lambda path: "a tokenizer")

    def stopped(model, tokenizer, pairs, **given):
        asked.append((type(model).__name__, tokenizer, pairs, given))
        raise FastlockError("far enough")

    monkeypatch.setattr(cli, "calibrate", stopped)
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    assert "far enough" in run("calibrate", base, "--base", base, "--out", out, code=cli.REFUSED)
    run("calibrate", base, "--lock", lock, "--out", out, "--trials", "3", "--seed", "7", code=cli.REFUSED)
    of_base, of_lock = asked
    assert of_base[:3] == of_lock[:3] == ("LlamaForCausalLM", "a tokenizer", None)
    assert type(of_base[3]["base"]).__name__ == "LlamaForCausalLM"
    assert (of_base[3]["lock"], of_base[3]["trials"]) == (None, None)
    assert (of_lock[3]["lock"], of_lock[3]["base"]) == (fastlock.Lock.load(lock), None)
    assert [of_lock[3][name] for name in ("trials", "seed", "journal")] == [3, 7, out / "journal.jsonl"]
    for other in ("--base", "--pairs"):
        said = run("calibrate", base, "--lock", lock, other, base, "--out", out, code=2)
        assert "give either --lock, or --base and --pairs" in said
    run("calibrate", base, "--lock", lock, "--out", out, "--trials", "0", code=2)
    assert len(asked) == 2
    assert not list(out.glob("*"))


# Where nothing can be written, not even by root.
PROC = pytest.param("/proc", "/proc: cannot be written", marks=pytest.mark.skipif(not Path("/proc").exists(), reason=""))


@pytest.fixture
def loading(monkeypatch):
    """What is loaded: nothing, for it stops there."""
    asked = []

    def load_model(path):
        asked.append(path)
        raise FastlockError("far enough")

    monkeypatch.setattr(cli, "load_model", load_model)
    return asked


@pytest.mark.parametrize("command", [["extract", "base"], ["train", "base", "base"]])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("new/lock.safelock", "Name it so: --out new/lock.safetensors"),
        ("new/lock.txt", "Name it so: --out new/lock.safetensors"),
        ("new/lock", "Name it so: --out new/lock.safetensors"),
        ("base", "Name a file in it for the lock: --out base/lock.safetensors"),
        ("lock.safetensors/new.safetensors", "lock.safetensors: already exists, and is not a directory"),
        ("lock.safetensors/new/new.safetensors", "lock.safetensors/new: cannot be written"),
        pytest.param("/proc/lock.safetensors", *PROC.values[1:], marks=PROC.marks),
    ],
)
def test_a_lock_that_cannot_be_written_is_refused_before_the_work(
    command, out, message, files, run, loading, monkeypatch
) -> None:
    monkeypatch.chdir(files)
    assert message in run(*command, "--out", out, code=cli.REFUSED)
    assert loading == []
    assert not (files / "new").exists()


@pytest.mark.parametrize(
    "command", [["extract", "base", "--out", "new.safetensors", "--work"], ["evaluate", "base", "--out"]]
)
@pytest.mark.parametrize(
    ("directory", "message"),
    [("lock.safetensors", "lock.safetensors: already exists, and is not a directory. Give another directory"), PROC],
)
def test_a_directory_that_cannot_be_written_is_refused_before_the_work(
    command, directory, message, files, run, loading, monkeypatch
) -> None:
    monkeypatch.chdir(files)
    assert message in run(*command, directory, code=cli.REFUSED)
    assert loading == []


def test_a_directory_with_other_files_is_none_to_work_in(files, run, loading) -> None:
    before = {path.name: path.read_bytes() for path in (files / "base").iterdir()}
    extract = ["extract", files / "base", "--out", files / "new.safetensors", "--work", files / "base"]
    assert "holds other files (config.json). Give a new directory" in run(*extract, code=cli.REFUSED)
    assert loading == []
    assert {path.name: path.read_bytes() for path in (files / "base").iterdir()} == before


def test_missing_directories_of_a_lock_are_made(files, run, monkeypatch) -> None:
    made = fastlock.Lock.load(files / "lock.safetensors")
    monkeypatch.setattr(cli, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(cli, "make_lock", lambda *_, **__: made)
    monkeypatch.setattr(cli, "train_lock", lambda *_, **__: made)
    for command in ("extract", files / "base"), ("train", files / "base", files / "base"):
        out = files / command[0] / "new" / "lock.safetensors"
        run(*command, "--out", out)
        assert fastlock.Lock.load(out) == made


def test_an_error_of_the_system_is_shown_with_its_path(files, run, monkeypatch) -> None:
    def full(path):
        raise OSError(28, "No space left on device", "/some/where")

    monkeypatch.setattr(cli, "load_tokenizer", full)
    said = run("extract", files / "base", "--out", files / "new.safetensors", code=cli.REFUSED)
    assert said.splitlines()[-1] == "fastlock: [Errno 28] No space left on device: '/some/where'"


def test_a_strength_without_a_lock_is_wrong(files, run, loading) -> None:
    assert "give the --lock, too" in run("evaluate", files / "base", "--strength", "2", code=2)
    assert loading == []


def test_inspect_cuts_nothing_off(files, run, monkeypatch) -> None:
    """In a narrow terminal: digests and names go on in the next line."""
    lock = fastlock.Lock.load(files / "lock.safetensors")
    fastlock.relock_checkpoint(files / "base", lock, files / "locked")
    monkeypatch.setattr(cli, "_out", Console(width=40))
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
    assert "a\\[/b]" in run("inspect", files / "a\\[/b]", code=cli.REFUSED)
    (files / "base").rename(files / "[red]base")
    assert "[red]base" in run("inspect", files / "[red]base").replace("\n", "")
