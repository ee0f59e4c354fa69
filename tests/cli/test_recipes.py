"""`fastlock extract`, `train`, `calibrate` and `evaluate`: what each reads and asks for before its long work."""

from pathlib import Path

import pytest

import fastlock
from fastlock.errors import FastlockError


def test_extract(files, run, monkeypatch) -> None:
    """The command's own part: it loads, reads the pairs, and writes what `extract` makes."""
    made = fastlock.Lock.load(files / "lock.safetensors")
    asked = []
    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", lambda path: "a tokenizer")
    monkeypatch.setattr("fastlock.recipes.extraction.extract", lambda *given, **_: asked.append(given) or made)
    pairs = files / "pairs.jsonl"
    pairs.write_text('{"question": "a?", "safe": "no", "unsafe": "yes"}\n')
    run("extract", files / "base", "--pairs", pairs, "--out", files / "new.safetensors", "--heads", "3", "--json")
    (_, tokenizer, given_pairs, heads, tokens) = asked[0]
    assert (tokenizer, given_pairs, heads, tokens) == ("a tokenizer", fastlock.load_pairs(pairs), 3, None)
    assert fastlock.Lock.load(files / "new.safetensors") == made


def test_extract_asks_for_what_its_options_say(files, run, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", lambda path: None)

    def made(_model, _tokenizer, *given, recipe, harmless, work, progress):
        asked.append((*given, recipe, harmless, work))
        return fastlock.Lock.load(files / "lock.safetensors")

    monkeypatch.setattr("fastlock.recipes.extraction.extract", made)
    (files / "harmless.txt").write_text("a\nb\n")
    extract = ["extract", files / "base", "--out", files / "new.safetensors"]
    run(*extract)
    options = ["--recipe", "prompt-end", "--harmless", files / "harmless.txt", "--work", files / "work"]
    run(*extract, "--tokens", "2", *options)
    pairs = fastlock.shipped_pairs()
    assert asked == [
        (pairs, None, None, "safetylock", None, None),
        (pairs, None, 2, "prompt-end", ("a", "b"), files / "work"),
    ]


def test_extract_asks_for_a_gate(files, run, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", lambda path: None)

    def made(_model, _tokenizer, *given, progress, **options):
        asked.append((*given, options))
        return fastlock.Lock.load(files / "lock.safetensors")

    monkeypatch.setattr("fastlock.recipes.extraction.extract", made)
    (files / "scary.txt").write_text("a\nb\n")
    extract = ["extract", files / "base", "--out", files / "new.safetensors", "--recipe", "null-space"]
    run(*extract, "--rank", "2", "--scary", files / "scary.txt", "--layers", "1-2")
    options = {"recipe": "null-space", "harmless": None, "work": None, "scary": ("a", "b"), "rank": 2}
    assert asked == [(fastlock.shipped_pairs(), None, None, options | {"layers": range(1, 3)})]


def test_calibrate(files, run, monkeypatch) -> None:
    """The command's own part: what it loads and asks for, of a base and of a lock."""
    asked = []
    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", lambda path: "a tokenizer")

    def stopped(model, tokenizer, pairs, **given):
        asked.append((type(model).__name__, tokenizer, pairs, given))
        raise FastlockError("far enough")

    monkeypatch.setattr("fastlock.recipes.calibration.calibrate", stopped)
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    assert "far enough" in run("calibrate", base, "--base", base, "--out", out, code=3)
    run("calibrate", base, "--lock", lock, "--out", out, "--trials", "3", "--seed", "7", code=3)
    of_base, of_lock = asked
    assert of_base[:3] == of_lock[:3] == ("LlamaForCausalLM", "a tokenizer", None)
    assert type(of_base[3]["base"]).__name__ == "LlamaForCausalLM"
    assert (of_base[3]["lock"], of_base[3]["trials"]) == (None, None)
    assert (of_lock[3]["lock"], of_lock[3]["base"]) == (fastlock.Lock.load(lock), None)
    assert [of_lock[3][name] for name in ("trials", "seed", "journal")] == [3, 7, out / "journal.jsonl"]
    for other in ("--base", "--pairs"):
        said = run("calibrate", base, "--lock", lock, other, base, "--out", out, code=2)
        assert f"--lock and {other} are both given: either the strength of this lock is searched" in said
    run("calibrate", base, "--lock", lock, "--out", out, "--trials", "0", code=2)
    assert len(asked) == 2
    assert not list(out.glob("*"))


def test_a_lock_and_a_base_are_refused_in_the_words_of_the_library(files, run) -> None:
    from tests.helpers.families import tiny_model

    lock = files / "lock.safetensors"
    with pytest.raises(FastlockError) as error:
        fastlock.calibrate(tiny_model("llama"), None, lock=fastlock.Lock.load(lock), base=tiny_model("llama"))
    said = run("calibrate", files / "base", "--lock", lock, "--base", files / "base", "--out", files / "out", code=2)
    assert str(error.value) in said.replace("--lock and --base", "lock and base")


# Where nothing can be written, not even by root.
PROC = pytest.param(
    "/proc", "/proc: cannot be written", marks=pytest.mark.skipif(not Path("/proc").exists(), reason="")
)


@pytest.mark.parametrize("command", [["extract", "base"], ["train", "base", "base"]])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("new/lock.safelock", "new/lock.safelock: a fastlock lock is a safetensors file; name it lock.safetensors."),
        ("new/lock.txt", "new/lock.txt: a fastlock lock is a safetensors file; name it lock.safetensors."),
        ("new/lock", "new/lock: a fastlock lock is a safetensors file; name it lock.safetensors."),
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
    said = run(*command, "--out", out, code=3)
    assert message in said
    assert loading == []
    assert not (files / "new").exists()
    if "name it" in message:  # the library's own words
        with pytest.raises(FastlockError) as error:
            fastlock.Lock.load("lock.safetensors").save(out)
        assert said == f"fastlock: {error.value}\n"


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
    assert message in run(*command, directory, code=3)
    assert loading == []


def test_the_work_begins_with_loading(files, run, loading) -> None:
    """What the tests above and below rely on: without a fault, the model is asked for."""
    assert "far enough" in run("extract", files / "base", "--out", files / "new.safetensors", code=3)
    assert "far enough" in run("evaluate", files / "base", code=3)
    assert "far enough" in run("train", files / "base", files / "base", "--out", files / "new.safetensors", code=3)
    assert [Path(path) for path in loading] == [files / "base"] * 3


def test_a_directory_with_other_files_is_none_to_work_in(files, run, loading) -> None:
    before = {path.name: path.read_bytes() for path in (files / "base").iterdir()}
    extract = ["extract", files / "base", "--out", files / "new.safetensors", "--work", files / "base"]
    assert "holds other files (config.json). Give a new directory" in run(*extract, code=3)
    assert loading == []
    assert {path.name: path.read_bytes() for path in (files / "base").iterdir()} == before


def test_missing_directories_of_a_lock_are_made(files, run, monkeypatch) -> None:
    made = fastlock.Lock.load(files / "lock.safetensors")
    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", lambda path: None)
    monkeypatch.setattr("fastlock.recipes.extraction.extract", lambda *_, **__: made)
    monkeypatch.setattr("fastlock.recipes.training.train_lock", lambda *_, **__: made)
    for command in ("extract", files / "base"), ("train", files / "base", files / "base"):
        out = files / command[0] / "new" / "lock.safetensors"
        run(*command, "--out", out)
        assert fastlock.Lock.load(out) == made


def test_a_strength_without_a_lock_is_wrong(files, run, loading) -> None:
    assert "Give the lock as well: --lock." in run("evaluate", files / "base", "--strength", "2", code=2)
    assert loading == []
