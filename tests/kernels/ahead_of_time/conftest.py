"""The fake driver, a folder of cubins for it, and both in place of the real ones."""

from pathlib import Path

import pytest

from fastlock.kernels.ahead_of_time import cubins
from tests.helpers import fake_driver
from tests.helpers.fake_driver import FakeDriver, describe, write_folder
from tests.kernels.ahead_of_time.launching import ALIGNED, KEPT


@pytest.fixture
def library() -> FakeDriver:
    library = FakeDriver()
    library.stack.append(fake_driver.context_of(0))
    return library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "cubins", [describe(variant) for variant in ALIGNED])
    return tmp_path / "cubins"


@pytest.fixture
def installed(monkeypatch, folder, library) -> FakeDriver:
    fake_driver.install(monkeypatch, folder, library)
    yield library
    cubins.LOADER.forget()
    KEPT.clear()
    assert library.broken == []
