"""What a Trainer that trains with Lisa is given, checked before anything is trained."""

from __future__ import annotations

import inspect
from typing import Any

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.finetuning.alternation import check_lisa, check_rows
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.proximal_adamw import ProximalAdamW

# What a Trainer must have for epochs of differing lengths, as all transformers since 5 do.
_NEEDED = ("_init_training_state", "_run_epoch")

# What `_prepare_dataset` of TRL's SFTTrainer takes.
_PREPARED_WITH = ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")

# The columns by which it decides what of a row is learned.
_FORMS = ("messages", "prompt", "completion", "text", "input_ids", "labels", "completion_mask", "assistant_masks")

# The `optim` that ProximalAdamW does the work of: the default, and its plain form.
_ADAMW = ("adamw_torch", "adamw_torch_fused")

_IN_ORDER = {"random": True, "sequential": False}


def check_trainer(trainer: object) -> None:
    """Refuse what cannot be made to train with Lisa.

    Raises:
        FastlockError: it is not a Trainer's class.
        UnsupportedError: it prepares its datasets in a way we do not know, or is too old.
    """
    from transformers import Trainer

    if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
        what = trainer.__name__ if isinstance(trainer, type) else f"a {type(trainer).__name__}"
        raise FastlockError(
            f"trainer is {what}; give a class: fastlock.lisa(transformers.Trainer), or fastlock.lisa(trl.SFTTrainer)."
        )
    if not all(hasattr(trainer, name) for name in _NEEDED):
        raise UnsupportedError(f"{trainer.__name__}: this transformers is too old for Lisa. Install a newer one.")
    prepare: Any = getattr(trainer, "_prepare_dataset", None)
    if prepare is not None and tuple(inspect.signature(prepare).parameters)[1:] != _PREPARED_WITH:
        raise UnsupportedError(
            f"{trainer.__name__}: how it prepares its datasets is not known, so the alignment dataset cannot be "
            "prepared in the same way. Use transformers.Trainer or trl.SFTTrainer, or Alternation and ProximalAdamW "
            "in a loop of your own."
        )


def check_datasets(lisa: object, alignment_dataset: object) -> Lisa:
    """The schedule; refuse what is none, and an alignment dataset that it cannot take rows from.

    Raises:
        FastlockError: `lisa` is not a `Lisa`, or it has alignment steps and there are no rows for them.
        UnsupportedError: the dataset has no length.
    """
    schedule = check_lisa(lisa)
    if schedule.alignment_steps:
        if alignment_dataset is None:
            raise FastlockError(
                f"alignment_steps is {schedule.alignment_steps}, and there is no alignment_dataset. Give one (harmful "
                "requests with the refusals to keep), or alignment_steps=0."
            )
        check_rows(1, rows("alignment_dataset", alignment_dataset), schedule)
    return schedule


def rows(name: str, dataset: Any) -> int:
    """How many rows a dataset has.

    Raises:
        UnsupportedError: it has no length, or cannot be asked for a row.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UnsupportedError(
            f"{name} is a {type(dataset).__name__}, which has no length and no row by its number, and Lisa decides "
            "which row comes when. Give a dataset with both; a stream can be read into datasets.Dataset."
        )
    return len(dataset)


def check_same_form(train_dataset: Any, alignment_dataset: Any) -> None:
    """Refuse datasets of different forms: TRL's SFTTrainer decides by the form what of a row is learned.

    Raises:
        FastlockError: one has messages, say, and the other prompts and completions.
    """
    forms = [
        [name for name in _FORMS if name in (getattr(dataset, "column_names", None) or ())]
        for dataset in (train_dataset, alignment_dataset)
    ]
    if forms[0] != forms[1] and all(forms):
        raise FastlockError(
            f"train_dataset has {', '.join(forms[0])}, and alignment_dataset {', '.join(forms[1])}: other parts would "
            "be learned of one than of the other. Give both in the same form: messages, prompt and completion, or text."
        )


def check_arguments(trainer: Any) -> None:
    """Refuse what a Trainer was given that Lisa would undo, or that would undo Lisa.

    Raises:
        FastlockError: an argument does not go with Lisa's optimizer or sampler.
    """
    given = trainer.optimizer_cls_and_kwargs
    own = given is not None and isinstance(given[0], type) and issubclass(given[0], ProximalAdamW)
    if trainer.optimizer is not None or (given is not None and not own):
        raise FastlockError(
            "the optimizer was given, and it is not a ProximalAdamW. Leave optimizers out, and for another setting "
            "give optimizer_cls_and_kwargs=(fastlock.ProximalAdamW, {...})."
        )
    optim = getattr(trainer.args.optim, "value", trainer.args.optim)
    if not own and (optim not in _ADAMW or trainer.args.optim_args):
        raise FastlockError(
            f"optim is {optim!r}, with optim_args {trainer.args.optim_args!r}; Lisa trains with ProximalAdamW. Leave "
            f"both out, or give optim={_ADAMW[0]!r}."
        )


def check_sharding(trainer: Any) -> None:
    """Refuse ways to divide a training in which each rank would have an anchor and a drift of its own.

    Raises:
        UnsupportedError: it is DeepSpeed, FSDP1, or FSDP on XLA.
    """
    instead = (
        "Use DDP or FSDP2 (fsdp_version 2, in fsdp_config or in accelerate's config); or ProximalAdamW and Alternation "
        "in a loop of your own."
    )
    if trainer.is_deepspeed_enabled:
        raise UnsupportedError(
            "this training is by DeepSpeed, whose optimizer keeps flat pieces of the weights on each rank: Lisa's "
            f"anchor would not be saved with them, nor its drift be summed. {instead}"
        )
    if trainer.is_fsdp_xla_enabled:
        raise UnsupportedError(f"this training is by FSDP on XLA, where Lisa was never run. {instead}")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UnsupportedError(
            f"this training is by FSDP{plugin.fsdp_version}, which keeps flat pieces of the weights on each rank: "
            f"Lisa's drift would be of one piece, and its clipping too. {instead}"
        )


def check_sampling(trainer: Any) -> None:
    """Refuse arguments that decide which row comes when, as Lisa does.

    Raises:
        FastlockError: there is no train_dataset, or it is empty, or `ignore_data_skip` is set.
        UnsupportedError: the dataset has no length, or the sampling is another one.
    """
    args = trainer.args
    if trainer.train_dataset is None:
        raise FastlockError("there is no train_dataset. Give the user's data.")
    check_rows(rows("train_dataset", trainer.train_dataset), 1, trainer.lisa)
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in _IN_ORDER:
        raise UnsupportedError(
            f"train_sampling_strategy is {strategy!r}, which would mix alignment rows and the user's in one step. Use "
            "'random' or 'sequential'."
        )
    if args.accelerator_config.split_batches:
        raise UnsupportedError(
            "split_batches is set: a batch would be divided among the ranks. Leave it out; per_device_train_batch_size "
            "is then the batch of one rank."
        )
    if args.ignore_data_skip:
        raise FastlockError(
            "ignore_data_skip is set: a resumed run would read other rows than its steps are for. Leave it out; with "
            "Lisa, skipping reads no data."
        )


def shuffled(trainer: Any) -> bool:
    """Whether the rows come in a random order, as `train_sampling_strategy` says."""
    return _IN_ORDER[getattr(trainer.args, "train_sampling_strategy", "random")]


def prepared(trainer: Any, dataset: Any) -> Any:
    """The alignment dataset as the trainer prepared its train_dataset: TRL's SFTTrainer tokenizes both in one way.

    Raises:
        FastlockError: nothing is left of it: the SFTTrainer drops rows that have nothing to learn.
    """
    if not hasattr(trainer, "_prepare_dataset") or trainer._skip_prepare_dataset:
        return dataset
    dataset = trainer._prepare_dataset(
        dataset, trainer.processing_class, trainer.args, trainer.args.packing, trainer._formatting_func, "alignment"
    )
    check_rows(1, len(dataset), trainer.lisa)
    return dataset
