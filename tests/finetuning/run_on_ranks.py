"""What `test_lisa_ranks` runs in each of two processes: DDP and FSDP2 through the Trainer, and FSDP2 in a loop.

python -m tests.finetuning.run_on_ranks OUT, with the variables that torchrun sets. Each rank writes OUT/rank-N.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.finetuning.lisa_runs import SAFE_ROWS, USER_ROWS, LisaRecording, Weights, arguments, lisa_trainer
from tests.finetuning.test_lisa_loops import BATCHES, SCHEDULE, STEPS, begin, loss_of, optimizer_of, small
from tests.helpers.families import state, tiny_model


def main(out: Path) -> None:
    results: dict[str, Any] = {"ddp": ddp(out), "even": even(out)}
    rank = dist.get_rank()
    results["fsdp"] = fsdp(out)
    results["trainer's fsdp"] = trainers_fsdp(out)  # the last: it changes what accelerate takes the processes for
    torch.save(results, out / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def ddp(out: Path) -> dict[str, Any]:
    """A run that was never stopped, and one that is resumed in the second epoch."""
    weights = Weights()
    options = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 8, "num_train_epochs": 3}
    whole = lisa_trainer(out / "ddp", SCHEDULE, callbacks=[weights], **options)
    whole.train()
    resumed = lisa_trainer(out / "resumed", SCHEDULE, **options)
    resumed.train(resume_from_checkpoint=str(out / "ddp" / "checkpoint-8"))
    return {
        "wrapped": type(whole.model_wrapped).__name__,
        "read": whole.read,
        "resumed": resumed.read,
        "weights": state(whole.model),
        "resumed weights": state(resumed.model),
        "drift": [entry["drift"] for entry in whole.state.log_history if "drift" in entry],
        "losses": [[entry.get(name) for name in LOSSES] for entry in whole.state.log_history],
        "anchors": (weights.anchors[2], weights.weights[2]),
        "micro losses": whole.losses,
    }


LOSSES = ("loss", "user_loss", "alignment_loss")


def even(out: Path) -> dict[str, Any]:
    """A run of which a single process with twice the accumulation reads the same rows in each step."""
    trainer = LisaRecording(
        tiny_model("llama"),
        arguments(out / "even", ddp_backend="gloo", num_train_epochs=1),
        train_dataset=USER_ROWS[:16],
        alignment_dataset=SAFE_ROWS,
        lisa=SCHEDULE,
    )
    trainer.train()
    return {"weights": state(trainer.model), "losses": [e.get("loss") for e in trainer.state.log_history]}


def trainers_fsdp(out: Path) -> dict[str, Any]:
    """The Trainer's own FSDP2: as in `even`, twice the epochs; and resumed from either kind of checkpoint."""
    let_accelerate_shard_on_a_cpu()

    def run(name: str, kind: str, resume: Path | None = None) -> Any:
        sharding = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}
        options = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": sharding}
        saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
        trainer = LisaRecording(
            tiny_model("llama"),
            arguments(out / name, **options, **saving),
            train_dataset=USER_ROWS[:16],
            alignment_dataset=SAFE_ROWS,
            lisa=SCHEDULE,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    results: dict[str, Any] = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        whole = run(kind, kind)
        resumed = run(f"{kind} resumed", kind, out / kind / "checkpoint-3")
        results[kind] = {
            "sharded": {type(p).__name__ for p in whole.model.parameters()},
            "anchors": {type(s["anchor"]).__name__ for s in whole._proximal_optimizer().state.values()},
            "weights": full(whole.model),
            "resumed": full(resumed.model),
            "drift": [entry["drift"] for entry in whole.state.log_history if "drift" in entry],
            "resumed drift": [entry["drift"] for entry in resumed.state.log_history if "drift" in entry],
            "losses": [entry["loss"] for entry in whole.state.log_history if "loss" in entry],
        }
    return results


def let_accelerate_shard_on_a_cpu() -> None:
    """Accelerate asks for accelerators before it shards, though what it then calls works on a CPU too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, kwargs["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin  # type: ignore[method-assign]


def fsdp(out: Path) -> dict[str, Any]:
    """The loop over shards, stopped and resumed by a distributed checkpoint; both ranks read the same batches."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def sharded() -> tuple[Any, Any]:
        model = small()
        optimizer = optimizer_of(model)  # made before the parameters are replaced, as accelerate does
        names = {id(p): name for name, p in model.named_parameters()}
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        now = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[names[id(p)]] for p in group["params"]]
        return model, optimizer

    def steps(model: Any, optimizer: Any, which: range) -> list[float]:
        drifts = []
        for step in which:
            begin(optimizer, step)
            optimizer.zero_grad()
            loss_of(model, BATCHES[step]).backward()
            optimizer.step()
            drifts.append(optimizer.drift())
        return drifts

    model, optimizer = sharded()
    drifts = steps(model, optimizer, range(4))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out / "dcp")
    drifts += steps(model, optimizer, range(4, STEPS))

    resumed, again = sharded()
    again.anchor()
    weights, moments = get_state_dict(resumed, again)
    held = {"model": weights, "optimizer": moments}
    dcp.load(held, checkpoint_id=out / "dcp")
    set_state_dict(resumed, again, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    steps(resumed, again, range(4, STEPS))
    return {
        "weights": full(model),
        "resumed": full(resumed),
        "drift": drifts,
        "sharded": all(type(s["anchor"]).__name__ == "DTensor" for s in optimizer.state.values()),
    }


def full(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
