"""Without a GPU the kernels run in Triton's interpreter, on the CPU."""

import os
import sys

import pytest
import torch

# Triton reads the variable when it is imported, when a kernel is defined and when it runs, so it stays set.
if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before tests/kernels could ask for its interpreter: "
            "set TRITON_INTERPRET=1, or run tests/kernels on its own."
        )
    os.environ["TRITON_INTERPRET"] = "1"
