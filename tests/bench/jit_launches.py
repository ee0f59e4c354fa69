"""Relock a model, and compute with locks per request, where kernels are compiled for sm_90 and nothing runs them.

Triton's JIT, its ptxas and its launcher are the real ones; the driver, of libcuda.py, launches nothing. Prints as JSON
what was launched and what was warned of. Run by test_jit_launches.py, in a process with the fake GPU.
"""

import ctypes
import json
import math
import os
import warnings

import torch

import fastlock
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.locked_linear import launch as locked_linear
from fastlock.kernels.locked_linear.reference import Inputs
from tests.helpers.families import random_lock, tiny_model


def launches() -> int:
    """How many there were so far: the last number of libcuda.c's record."""
    numbers = (ctypes.c_uint64 * 17)()
    ctypes.CDLL("libcuda.so.1").recorded(numbers)
    return numbers[-1]


def relocked(dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
    """The kernel writes nothing: that is noticed, and the reference folds on the device instead."""
    model = tiny_model("llama", dtype).to("cuda")
    lock = random_lock(model)
    before = launches()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fastlock.relock(model, lock)
        fastlock.relock(model, lock, 2.0)
    bias, verified = model.model.layers[0].self_attn.o_proj.bias, fastlock.verify(model, lock)
    return {
        "launches": launches() - before,
        "device": bias.device.type,
        "verified": verified.strength if verified else None,
        "warned": [str(one.message) for one in said if issubclass(one.category, RuntimeWarning)],
    }


def locks_per_request() -> dict[str, object]:
    """How many kernels each way of the projection launches for one row, and whether they wrote anything."""
    width, head_dim = 128, 32
    weight = torch.randn(width, width, device="cuda").bfloat16()
    heads = torch.tensor([0, -1, 1, -1], dtype=torch.int32, device="cuda")
    slots = torch.tensor([[0, 1]], dtype=torch.int32, device="cuda")
    values, folds = torch.randn(2, head_dim, device="cuda"), torch.randn(1, width, device="cuda")
    lock, strength = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.ones(1, device="cuda")
    x = torch.randn(1, width, device="cuda").bfloat16()
    inputs = Inputs(x, weight, None, heads, slots, values, folds, lock, strength)
    found = {}
    for way in {way.kind: way for way in locked_linear.ways_for(inputs)}.values():
        before = launches()
        out = torch.full((1, width), math.nan, dtype=torch.bfloat16, device="cuda")
        locked_linear.run(way, inputs, out if way.tile else None)
        found[way.kind] = {"launches": launches() - before, "untouched": bool(out.isnan().all())}
    return found


def refused() -> dict[str, object]:
    """The same with a kernel that the driver does not load; another one, as it has the first already."""
    os.environ["FAKE_LIBCUDA_REFUSES"] = "cuModuleLoadData"
    return relocked(torch.float16)


def main() -> None:
    os.environ[cubins.SWITCH] = "0"  # by the JIT
    print(json.dumps({run.__name__: run() for run in (relocked, locks_per_request, refused)}))


if __name__ == "__main__":
    main()
