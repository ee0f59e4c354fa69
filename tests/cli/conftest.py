"""What the tests of all commands need."""

from pathlib import Path

import pytest

from fastlock.errors import FastlockError
from tests.helpers.command import run_command
from tests.helpers.families import random_lock, tiny_model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with a checkpoint, `base`, and a lock."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    random_lock(model, base_model="tiny", num_layers=3).save(tmp_path / "lock.safetensors")
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """Run a command in a wide terminal: what it printed, once its exit code is as expected."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, code: int = 0) -> str:
        done = run_command(*arguments, code=code)
        return done.out or done.err

    return run


@pytest.fixture
def loading(monkeypatch):
    """The models that were asked for; loading one ends the command."""
    asked = []

    def load_model(path, *, to_run):
        asked.append(path)
        raise FastlockError("far enough")

    monkeypatch.setattr("fastlock.models.loading.load_model", load_model)
    return asked
