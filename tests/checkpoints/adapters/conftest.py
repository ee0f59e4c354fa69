"""The base that the adapters of these tests are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlock.checkpoints.adapters.folding import BasePart, base_part
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.storage.places import files_in
from tests.helpers.adapters import base_model
from tests.helpers.families import random_lock, tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="session")
def part(base: Path) -> BasePart:
    return base_part(Checkpoint(files_in(base), str(base)), random_lock(tiny_model("llama")))
