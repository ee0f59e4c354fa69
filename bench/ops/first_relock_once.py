"""Time the first relock of a process, of a model of Llama-3 8B's shape in bfloat16, and print it as JSON.

Everything is imported, the device's context is ready and the model is on it before the clock starts; fastlock has
launched nothing yet. The second relock of the same process is timed too. Run by first_relock.py.
"""

from __future__ import annotations

import json
import sys
import time

import torch

import fastlock
from bench.lib import machine
from bench.lib.workloads import SHAPES, STRENGTH, Zoo, errors, lock_for
from fastlock.kernels.fold.reference import HeadColumns

SHAPE = SHAPES["8B"]


def main() -> None:
    device = machine.device()
    lock, _ = lock_for(SHAPE)
    displacements = lock.displacement(STRENGTH)
    size = (SHAPE.hidden, SHAPE.num_heads * SHAPE.head_dim)
    weights = [torch.randn(size, device=device).mul_(0.02).to(torch.bfloat16) for _ in displacements]
    model = Zoo(SHAPE, torch.bfloat16, device, lock, "", [weights], 0, None).shell(weights)
    machine.synchronize(device)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        fastlock.relock(model, lock, STRENGTH)
        machine.synchronize(device)
        seconds.append(time.perf_counter() - start)
    folds = [model.model.layers[layer].self_attn.o_proj.bias for layer in displacements]
    columns = [
        HeadColumns.in_projection(weight, d.heads, d.head_dim)
        for weight, d in zip(weights, displacements.values(), strict=True)
    ]
    error = errors(columns, [d.values for d in displacements.values()], folds, [None] * len(folds))
    jit = sys.modules.get("fastlock.kernels.fold.triton_kernel") is not None
    by = "reference" if device.type == "cpu" else "jit" if jit else "cubin"
    print(json.dumps({"first": seconds[0], "second": seconds[1], "by": by, "error_in_bounds": error["bounds"]}))


if __name__ == "__main__":
    main()
