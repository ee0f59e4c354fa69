"""The command as a whole: how fast it starts, what it says of wrong arguments, and the exit codes scripts go by."""

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fastlock
from fastlock.architectures.serving_stacks import DEFAULT_STACKS, STACKS
from fastlock.cli import commands, main
from fastlock.evaluation.keyword_judge import KEYWORDS
from fastlock.locks.lock import strength_for
from fastlock.recipes.recipe_table import GATE_RECIPES, RECIPES
from tests.helpers.families import random_lock, tiny_model

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "triton", "optuna", "ray", "pebble", "rich"}
COMMANDS = {command.name: command for command in main.COMMANDS.commands}
ZOO = {command.name: command for command in COMMANDS["zoo"].commands}


def started(*arguments: str) -> tuple[int, str, set[str]]:
    """A new process's exit code, what it printed, and what it imported that takes long."""
    code = (
        "import atexit, sys\n"
        "from fastlock.cli.main import main\n"
        f"atexit.register(lambda: print('heavy:', *sorted({HEAVY} & sys.modules.keys()), file=sys.stderr))\n"
        f"main({list(arguments)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    said, _, heavy = done.stderr.rpartition("heavy:")
    return done.returncode, done.stdout + said, set(heavy.split())


def test_it_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastlock", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastlock {fastlock.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["zoo", "--help"],
        *([name, "--help"] for name in COMMANDS),
        *(["zoo", name, "--help"] for name in ZOO),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_nothing_heavy(arguments) -> None:
    assert started(*arguments)[0::2] == (0, set())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: fastlock"),
        (["zoo"], "usage: fastlock zoo"),
        (["relok"], "there is no command 'relok'; choose one of inspect, extract, "),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["relock", "x", "--lock", "y", "--out", "z", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["relock", "x", "--lock", "y", "--out", "z", "w"], "unrecognized arguments: w"),
        (["relock", "--lock", "y", "--out", "z"], "arguments are required: CHECKPOINT"),
        (["relock", "x", "--out", "z"], "arguments are required: --lock"),
        (["relock", "x", "--lock", "y"], "give either --out DIR or --in-place."),
        (["relock", "x", "--lock", "y", "--out", "z", "--in-place"], "give either --out DIR or --in-place."),
        (["relock", "x", "--lock", "y", "--in-place"], "--in-place was not confirmed; nothing was changed."),
        (["relock", "x", "--lock", "y", "--out", "z", "--stren", "2"], "unrecognized arguments: --stren 2"),
        (["relock", "x", "--lock", "y", "--out", "z", "--strength", "much"], "--strength: invalid float value"),
        (["evaluate", "x", "--new-tokens", "0"], "--new-tokens: 0 was given; it must be an integer of at least 1."),
        (["evaluate", "x", "--batch-size", "1.5"], "1.5 was given; it must be an integer of at least 1."),
        (["evaluate", "x", "--strength", "2"], "Give the lock as well: --lock."),
        (["calibrate", "x", "--out", "y", "--lock", "z", "--pairs", "w"], "--lock and --pairs are both given"),
        (["doctor", "--for", "vllm"], "Name one, or leave --for out."),
        (["zoo", "relock", "x", "--lock", "y", "--out", "z", "--rank", "1"], "Give both"),
        (["zoo", "verify", "x", "--lock", "y", "--workers", "0"], "it must be an integer of at least 1."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_import_nothing_heavy(arguments, said) -> None:
    code, printed, heavy = started(*arguments)
    assert (code, heavy) == (2, set())
    assert said in printed


def test_options_may_stand_anywhere(run) -> None:
    """Between the arguments, too, as in any other command."""
    calls = []
    train = COMMANDS["train"]._replace(run=lambda **values: calls.append(values))
    for arguments in (["b", "--steps", "2", "f", "--out", "o", "g"], ["--out=o", "b", "f", "g", "--steps", "2"]):
        assert commands.call(train, arguments) == 0
    assert calls[0] == calls[1]
    assert (calls[0]["base"], calls[0]["fine_tunes"]) == (Path("b"), [Path("f"), Path("g")])


def options(command: commands.Command) -> dict[str, dict]:
    """The settings of a command's options, by the name under which its function gets them."""
    return {
        settings.get("dest", names[0].lstrip("-").replace("-", "_")): settings for names, settings in command.options
    }


@pytest.mark.parametrize("command", [*(c for c in COMMANDS.values() if c.name != "zoo"), *ZOO.values()])
def test_a_command_is_given_what_it_takes(command) -> None:
    assert options(command).keys() == inspect.signature(command.run).parameters.keys()


@pytest.mark.parametrize("name", ["extract", "train", "calibrate", "evaluate"])
def test_defaults_are_those_of_the_library(name) -> None:
    library = {"train": "train_lock"}.get(name, name)
    parameters = inspect.signature(getattr(fastlock, library)).parameters
    defaults = {
        name: settings["default"] for name, settings in options(COMMANDS[name]).items() if "default" in settings
    }
    if name == "evaluate":
        assert defaults.pop("judge") == KEYWORDS
    assert defaults
    for option, default in defaults.items():
        assert parameters[option].default == default, option


def test_the_help_names_what_there_is() -> None:
    relock, zoo_relock = options(COMMANDS["relock"]), options(ZOO["relock"])
    for settings in (relock, zoo_relock):
        assert f"{', '.join(STACKS)}." in settings["stacks"]["help"]
        assert settings["stacks"]["help"].endswith(f"Default: {', '.join(DEFAULT_STACKS)}.")
        default = strength_for(random_lock(tiny_model("llama")), None)
        assert settings["strength"]["help"].endswith(f"otherwise {default:g}.")
    assert set(re.findall(r"[a-z]+-?[a-z]+", options(COMMANDS["extract"])["recipe"]["help"])) >= {
        *RECIPES,
        *GATE_RECIPES,
    }


def test_errors_end_with_their_own_exit_code_and_reason(files, run) -> None:
    lock = files / "lock.safetensors"
    assert "does not exist" in run("inspect", files / "nothing", code=3)
    assert "already exists" in run("relock", files / "base", "--lock", lock, "--out", files, code=3)
    assert "negative strength" in run(
        *("relock", files / "base", "--lock", lock, "--out", files / "out"), "--strength", "-2", code=3
    )
    assert not (files / "out").exists()


def test_a_fault_of_its_own_is_told_from_an_error(files, run, monkeypatch) -> None:
    def broken(path):
        raise ZeroDivisionError

    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", broken)
    assert "ZeroDivisionError" in run("extract", files / "base", "--out", files / "x.safetensors", code=4)


def test_an_error_of_the_system_is_shown_with_its_path(files, run, monkeypatch) -> None:
    def full(path):
        raise OSError(28, "No space left on device", "/some/where")

    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", full)
    said = run("extract", files / "base", "--out", files / "new.safetensors", code=3)
    assert said.splitlines()[-1] == "fastlock: [Errno 28] No space left on device: '/some/where'"


def test_ctrl_c_ends_it(files, run, monkeypatch) -> None:
    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", stopped)
    assert "Traceback" not in run("extract", files / "base", "--out", files / "x.safetensors", code=130)


def test_a_reader_that_went_away_is_no_fault(files) -> None:
    """`fastlock inspect … | head` says nothing of a broken pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastlock", "inspect", files / "lock.safetensors", "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_our_warnings_are_sentences_and_others_say_where_they_are_from(monkeypatch, capsys) -> None:
    def warning(arguments) -> int:
        warnings.warn("an old directory is left. Remove it.", fastlock.FastlockWarning, stacklevel=1)
        warnings.warn("not ours", RuntimeWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(main, "_exit_code", warning)
    monkeypatch.setenv("COLUMNS", "200")
    before = warnings.showwarning
    with pytest.raises(SystemExit):
        main.main([])
    ours, theirs, *_ = capsys.readouterr().err.splitlines()
    assert ours == "fastlock: warning: an old directory is left. Remove it."
    assert theirs.startswith(f"{__file__}:")
    assert theirs.endswith("RuntimeWarning: not ours")
    assert warnings.showwarning is before
