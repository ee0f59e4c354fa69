"""Small trainings of a tiny Llama, and what they did, for the tests of Lisa's trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.lisa_trainer import lisa
from tests.helpers.families import tiny_model

USER, SAFE = 21, 5  # rows of either dataset; 21 is no multiple of any batch here


def rows_of(count: int, first: int) -> list[dict[str, torch.Tensor]]:
    """Rows that begin with their number; as many of their labels as their number says, and more, are masked."""
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        ids = torch.cat([torch.tensor([number]), torch.randint(3, 119, (7,), generator=generator)])
        labels = ids.clone()
        labels[: 1 + number % 5] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


USER_ROWS, SAFE_ROWS = rows_of(USER, 0), rows_of(SAFE, USER)
EVAL_ROWS = rows_of(4, 100)


class Recording(Trainer):
    """Notes the rows of each micro-batch, with the optimizer step that they are for, and each loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read: list[tuple[int, list[int]]] = []
        self.losses: list[float] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.read.append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss

    def rows_of_steps(self) -> dict[int, list[int]]:
        """The rows of each optimizer step, counted over the whole training."""
        steps: dict[int, list[int]] = {}
        for step, rows in self.read:
            steps.setdefault(step, []).extend(rows)
        return steps


LisaRecording = lisa(Recording)


class Weights(TrainerCallback):
    """Copies of the trained weights and of the optimizer's anchors: before each step, and after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.anchors: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        states = getattr(optimizer, "optimizer", optimizer).state
        self.anchors.append({name: states[p]["anchor"].clone() for name, p in named.items() if "anchor" in states[p]})


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(directory), **{**settings, **changes})


def lisa_trainer(directory: Path, schedule: Lisa, model: Any = None, **changes: Any) -> Any:
    """A trainer with Lisa over the rows above; `changes` are arguments of TrainingArguments, or of the Trainer."""
    given = {key: changes.pop(key) for key in ("callbacks", "eval_dataset") if key in changes}
    return LisaRecording(
        tiny_model("llama") if model is None else model,
        arguments(directory, **changes),
        train_dataset=USER_ROWS,
        alignment_dataset=SAFE_ROWS,
        lisa=schedule,
        **given,
    )


def by_name(optimizer: Any) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors of an optimizer's state, by the number of their parameter."""
    return dict(getattr(optimizer, "optimizer", optimizer).state_dict()["state"])


def same_optimizer(a: Any, b: Any) -> bool:
    """Whether two optimizers hold the same tensors, to the bit."""
    a, b = by_name(a), by_name(b)
    return a.keys() == b.keys() and all(_same(a[i], b[i]) for i in a)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
