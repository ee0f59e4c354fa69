"""Launch every kind of the fold kernel once on cold models, for `ncu` to watch, and print which, as JSON.

Run by fold_counters.py. What is launched before the profiler is started (the check of a kernel's first launch) is not
counted.
"""

from __future__ import annotations

import json

import torch

from bench.lib import machine
from bench.lib.paths import Batch
from bench.lib.workloads import SHAPES, make_zoo
from fastlock.kernels.fold.launch import build_table, launch
from fastlock.kernels.fold.variants import KINDS

# Of the shape of Llama-3 8B: as many as the zoo has, at most.
MODELS = (1, 64)


def main() -> None:
    device = machine.device()
    zoo = make_zoo(SHAPES["8B"], torch.bfloat16, device, 0.0, None)
    launched = []
    for models in sorted({min(count, len(zoo.models)) for count in MODELS}):
        batch = Batch(zoo, list(range(models)), [])
        for kind in KINDS:
            table = build_table(batch.columns, batch.values, batch.biases, batch.outs, kind)
            machine.synchronize(device)
            torch.cuda.profiler.start()
            launch(table)
            machine.synchronize(device)
            torch.cuda.profiler.stop()
            moved = models * (zoo.locked_bytes + zoo.bias_bytes)
            launched.append({"shape": "8B", "models": models, "kind": kind, "bytes": moved})
    print(json.dumps(launched))


if __name__ == "__main__":
    main()
