"""Triton's kernels on the fake GPU: interpreted, on the host's memory."""

import functools
import os

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"  # for Triton's own functions, which are defined as it is imported
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.helpers.fake_gpu.operators import State, on_host


def install() -> None:
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]  # which that sets; fastlock is to believe that Triton compiles
    interpreter.GridExecutor.__call__ = _on_host_memory(interpreter.GridExecutor.__call__)
    interpreter._convert_float = _rounding(interpreter._convert_float)


def _on_host_memory(launch):
    @functools.wraps(launch)
    def launched_there(self, *arguments, **options):
        if State.asleep:
            return
        arguments, options = map(on_host, arguments), {name: on_host(value) for name, value in options.items()}
        compute = functools.partial(launch, self, *arguments, **options)
        compute()
        if State.capturing is not None:
            State.capturing.append((compute, None))

    return launched_there


def _rounding(convert):
    """A GPU rounds float32 to bfloat16 to the nearest; the interpreter cuts it off."""

    def rounded(data, of, to, mode):
        if (of, to) != (tl.float32, tl.bfloat16):
            return convert(data, of, to, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()

    return rounded
