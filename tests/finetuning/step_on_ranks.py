"""What `test_proximal_adamw_ranks` runs in each of two processes: python -m tests.finetuning.step_on_ranks OUT RANK.

Each rank writes OUT/rank-RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlock
from fastlock.errors import FastlockError
from fastlock.kernels.proximal_step import launch

SETTINGS = {"lr": 0.01, "pull": 0.5, "max_grad_norm": 0.05}
STEPS = 4


def small() -> nn.Sequential:
    """Weights and biases that two ranks do not share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def sharded() -> nn.Sequential:
    model = small()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def train(model: Any, optimizer: fastlock.ProximalAdamW) -> None:
    """The same batches on every rank; the anchor is taken before the second."""
    for step in range(STEPS):
        if step == 1:
            optimizer.anchor()
        torch.manual_seed(step)
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Whole ones."""
    named = model.named_parameters()
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named}


def result(model: Any) -> dict[str, Any]:
    """The weights and the drift after training."""
    optimizer = fastlock.ProximalAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer)
    return {"weights": weights(model), "drift": optimizer.drift(), "kernels": len(optimizer._runner._tables)}


def saved_and_loaded(out: Path, flatten: bool) -> dict[str, Any]:
    """A distributed checkpoint, loaded with room for its anchor and without."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = sharded()
    optimizer = fastlock.ProximalAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer)
    names = ("model", "optimizer")
    dcp.save(dict(zip(names, get_state_dict(model, optimizer, options=options), strict=True)), checkpoint_id=out)
    found: dict[str, Any] = {"drift": optimizer.drift()}
    for room in (True, False):
        again = sharded()
        resumed = fastlock.ProximalAdamW(again.parameters(), lr=0.5, pull=0.1)
        if room:
            resumed.anchor()
        before = weights(again)
        state = dict(zip(names, get_state_dict(again, resumed, options=options), strict=True))
        found[f"moved {room}"] = [
            name for name, weight in weights(again).items() if not torch.equal(weight, before[name])
        ]
        dcp.load(state, checkpoint_id=out)
        try:
            set_state_dict(
                again, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
            )
            found[f"loaded {room}"] = resumed.drift()
            found["pull"] = resumed.param_groups[0]["pull"]
        except FastlockError as error:
            found[f"loaded {room}"] = str(error)
    return found


def main(out: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {"alone": result(small()), "fsdp": result(sharded())}
    results["ddp"] = result(DistributedDataParallel(small(), gradient_as_bucket_view=True))
    results["checkpoints"] = {flatten: saved_and_loaded(out / f"{flatten}", flatten) for flatten in (False, True)}
    launch.has_kernels = lambda device: True
    torch.cuda.is_current_stream_capturing = lambda: False
    results["fsdp by kernels"] = result(sharded())
    results["ddp by kernels"] = result(DistributedDataParallel(small(), gradient_as_bucket_view=True))
    torch.save(results, out / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
