"""Shared by all tests: no network, no progress bars, and the same random numbers each time."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
