"""Lisa in transformers' Trainer and in TRL's SFTTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset

from fastlock.errors import FastlockError
from fastlock.finetuning.alternation import Alternation
from fastlock.finetuning.lisa_arguments import (
    check_arguments,
    check_datasets,
    check_same_form,
    check_sampling,
    check_sharding,
    check_trainer,
    prepared,
    shuffled,
)
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.proximal_adamw import ProximalAdamW

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    _Base = Trainer
else:
    _Base = object

_STATES = ("alignment", "user")


def lisa(trainer: type[Trainer]) -> type[Any]:
    """A subclass of a Trainer that trains with Lisa (arXiv 2405.18641): alternating, and pulled back to an anchor.

    It takes what the Trainer takes, and two arguments more: `alignment_dataset`, which is prepared as the
    train_dataset is, and `lisa`, a `fastlock.Lisa`.

        Trainer = fastlock.lisa(trl.SFTTrainer)
        Trainer(model, args, train_dataset=user, alignment_dataset=safe, lisa=fastlock.Lisa(100, 900, pull=1.0)).train()

    The optimizer is `ProximalAdamW`, with the settings of `args`; the pull is added to the gradient in its step, after
    clipping, and is in no loss, neither in training nor in evaluation. `num_train_epochs` counts passes through the
    train_dataset, which the alignment steps lengthen. Logs have three numbers more: `alignment_loss` and `user_loss`,
    the mean over the steps of either state since the last log, and `drift`, ‖w - anchor‖ over all that is trained. A
    run that is resumed from a checkpoint, anywhere, goes on as if it had never been stopped.

    Args:
        trainer: `transformers.Trainer`, `trl.SFTTrainer`, or a subclass of theirs.

    Raises:
        FastlockError: it is not such a class. The new class raises one, before anything is trained, for a schedule, a
            dataset or an argument that does not fit.
        UnsupportedError: it prepares its datasets in a way we do not know; or, from the new class, datasets are streams
            or are sampled otherwise, or the training is by DeepSpeed or by FSDP other than FSDP2.
    """
    check_trainer(trainer)
    if issubclass(trainer, LisaTraining):
        return trainer
    return type(f"Lisa{trainer.__name__}", (LisaTraining, trainer), {"__module__": __name__})


class LisaTraining(_Base):
    """What `lisa` adds to a Trainer."""

    def __init__(self, *args: Any, alignment_dataset: Any = None, lisa: Lisa | None = None, **kwargs: Any) -> None:
        schedule = check_datasets(lisa, alignment_dataset)
        if schedule.alignment_steps and hasattr(self, "_prepare_dataset"):
            check_same_form(kwargs.get("train_dataset", args[3] if len(args) > 3 else None), alignment_dataset)
        super().__init__(*args, **kwargs)
        self.lisa = schedule
        self._alternation: Alternation | None = None
        self._begin_run()
        check_sharding(self)
        check_arguments(self)
        if schedule.alignment_steps:
            check_sampling(self)
            user: Any = self.train_dataset
            alignment = prepared(self, alignment_dataset)
            self._user_rows, self._alignment_rows = len(user), len(alignment)
            self.train_dataset = ConcatDataset([user, alignment])

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """ProximalAdamW with the settings of `args`; its pull is set step by step."""
        betas = (args.adam_beta1, args.adam_beta2)
        return ProximalAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "pull": 0.0}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.lisa.alignment_steps:
            return super()._get_train_sampler(train_dataset)
        batches = self.args.gradient_accumulation_steps
        self._alternation = Alternation(
            self._user_rows,
            self._alignment_rows,
            self.lisa,
            batch_size=self._train_batch_size,
            accumulation=batches,
            ranks=self.get_total_train_batch_size(self.args) // (self._train_batch_size * batches),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=shuffled(self),
            drop_last=self.args.dataloader_drop_last,
        )
        return self._alternation

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As the Trainer's, with epochs that alignment steps lengthen."""
        values = super().set_initial_training_values(args, dataloader)
        self._begin_run()
        rows = self._alternation
        if rows is None:
            return values
        _, _, examples, _, batch, batches, _ = values
        steps = args.max_steps if args.max_steps > 0 else rows.steps_of(args.num_train_epochs)
        return rows.epoch_of(steps - 1) + 1, rows.steps(0), examples, steps * batch, batch, batches, steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        values = super()._init_training_state(*args, **kwargs)
        rows = self._alternation
        if rows is None:
            return values
        epoch = rows.epoch_of(self.state.global_step)
        skipped = self.state.global_step - rows.start(epoch)
        return epoch, skipped * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's; a sharded optimizer loads what it has room for, so it gets an anchor first."""
        if checkpoint is not None and self.is_fsdp_enabled and self.lisa.pull:
            self._proximal_optimizer().anchor()
        super()._load_optimizer_and_scheduler(checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._alternation
        if rows is not None:
            rows.set_epoch(kwargs["epoch"])  # accelerate does not find the sampler behind the batches it skips
            batch = self.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
            kwargs |= {
                "num_update_steps_per_epoch": rows.steps(rows.epoch),
                "steps_in_epoch": -(-len(rows) // batch),
            }
        return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As the Trainer's; before the first of an optimizer step, set the pull, and at a switch take the anchor."""
        step = self.state.global_step
        if self._begun != step:
            self._begin_step(step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses[self.lisa.state(step)] += loss.detach()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; training logs say the loss of each state and the drift, too."""
        if "loss" in logs:
            logs.update(self._state_losses())
            if self.lisa.pull:
                logs["drift"] = self._proximal_optimizer().drift()
        super().log(logs, start_time)

    def _begin_run(self) -> None:
        self._begun: int | None = None
        self._forget_losses()

    def _forget_losses(self) -> None:
        self._steps = dict.fromkeys(_STATES, 0)
        self._losses = {state: torch.zeros((), device=self.args.device) for state in _STATES}

    def _begin_step(self, step: int) -> None:
        self._begun = step
        self._steps[self.lisa.state(step)] += 1
        optimizer = self._proximal_optimizer()
        if self.lisa.pull and self.lisa.switches_at(step):
            optimizer.anchor()
        elif self.lisa.pull and not all(group["anchored"] for group in optimizer.param_groups):
            raise FastlockError(
                f"step {step} pulls to an anchor, and the checkpoint that this run resumes from has none: it was saved "
                "without its optimizer (save_only_model), or by a Trainer without Lisa. Resume from another one, or "
                "load its weights and start anew."
            )
        for group in optimizer.param_groups:
            group["pull"] = self.lisa.pull_at(step)

    def _state_losses(self) -> dict[str, float]:
        """The mean loss of each state that had steps since the last log, over all ranks, as the Trainer's own is."""
        losses = {}
        for state, steps in self._steps.items():
            if steps:
                loss = self.accelerator.reduce(self._losses[state], reduction="mean")
                losses[f"{state}_loss"] = float(loss) / steps
        self._forget_losses()
        return losses

    def _proximal_optimizer(self) -> ProximalAdamW:
        """The optimizer, out of what accelerate wraps it in."""
        optimizer: Any = self.optimizer
        while not isinstance(optimizer, ProximalAdamW):
            optimizer = getattr(optimizer, "optimizer", None)
            if optimizer is None:
                raise FastlockError(
                    "the optimizer is no ProximalAdamW: it was replaced after the Trainer was made. Leave it to Lisa."
                )
        return optimizer
