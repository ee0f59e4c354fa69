"""Shared by all tests: no network, no progress bars, kernels interpreted, and the same random numbers each time."""

import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, on the CPU. Triton reads the variable when it is imported, when
# a kernel is defined and when it runs, so it stays set.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before the tests could ask for its interpreter: set TRITON_INTERPRET=1."
        )
    os.environ["TRITON_INTERPRET"] = "1"

import transformers

from tests.helpers.fake_gpu import limits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limits.skip(items)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
