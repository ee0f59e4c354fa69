"""A zoo of tiny checkpoints."""

import shutil

import pytest

import fastlock
from tests.helpers.families import random_lock, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tiny checkpoints with different weights, one of another family, and a lock."""
    folder = tmp_path_factory.mktemp("made")
    for seed in (1, 2):
        tiny_model("llama", seed=seed).save_pretrained(folder / f"tune{seed}")
    tiny_model("gpt2").save_pretrained(folder / "other")
    random_lock(tiny_model("llama")).save(folder / "lock.safetensors")
    return folder


@pytest.fixture
def lock(made):
    return fastlock.Lock.load(made / "lock.safetensors")


@pytest.fixture
def tunes(made, tmp_path):
    """A directory of six checkpoints, a to f."""
    for number, name in enumerate("abcdef"):
        shutil.copytree(made / f"tune{1 + number % 2}", tmp_path / "zoo" / name)
    return tmp_path / "zoo"
