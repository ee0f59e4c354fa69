"""A fine-tune that keeps refusals, from a base's directory to a new one: Lisa, a frozen band, or both."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.finetuning.finetune_directory import FinetuneDirectory
from fastlock.finetuning.finetune_rows import TokenRow, load_conversations, padded, token_rows
from fastlock.finetuning.finetune_settings import FinetuneSettings
from fastlock.finetuning.finetune_watch import TrainingWatch, not_finite
from fastlock.finetuning.freezing import freeze, lora_outside
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.lisa_trainer import lisa
from fastlock.finetuning.proximal_adamw import ProximalAdamW
from fastlock.inference.batching import Progress, no_progress
from fastlock.inference.chat import positions
from fastlock.locks.band import Band
from fastlock.models.loading import load_model, load_tokenizer
from fastlock.models.reloaded import check_unlocked
from fastlock.storage.places import files_digest
from fastlock.version import __version__

BandChoice = Callable[[Any, Any], Band | None]
"""Given a model and its tokenizer, the band to freeze."""

_LOG_EVERY = 10

# What belongs to a tokenizer, and is taken over as it is.
_TOKENIZER_FILES = (
    "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.tiktoken tekken.json spiece.model "
    "chat_template* generation_config.json"
).split()


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tune did.

    Attributes:
        steps: optimizer steps, all in all.
        resumed_at: the step that this run went on from; 0 for a new one.
        lisa: the schedule.
        band: the layers that were frozen.
        cut: answers that were longer than a row may be.
        first_loss, last_loss: means of the first and of the last steps that were logged.
    """

    steps: int
    resumed_at: int
    lisa: Lisa
    band: Band | None
    cut: int
    first_loss: float | None
    last_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """What was done as data that JSON can hold."""
        band = None if self.band is None else [self.band.first, self.band.last]
        return {**asdict(self), "band": band}


def run_finetune(
    base: Path,
    data: Path,
    alignment: Path | None,
    out: Path,
    settings: FinetuneSettings,
    choose_band: BandChoice | None = None,
    band_as_given: str | None = None,
    progress: Progress = no_progress,
) -> Finetuned:
    """Fine-tune a base, and write the result as a checkpoint that can be calibrated and relocked.

    The same call resumes what was stopped, from the last checkpoint.

    Args:
        base: the directory of an aligned model, in float32 or bfloat16.
        data: the user's rows, JSON lines; see `finetune_rows`.
        alignment: rows to alternate with: harmful requests with the refusals to keep. None: nothing alternates.
        out: a directory to make, or that such a run was stopped in.
        settings: what decides the run.
        choose_band: finds the layers to freeze, once the model is loaded; a run that is resumed keeps its band.
        band_as_given: the band in the user's words, to tell whether a run that is resumed is the same.
        progress: shows how far it is.

    Raises:
        FastlockError, and its kinds: before anything is trained, for data, a model or settings that cannot be used;
            later, where memory or disk run out or the training diverges: the last checkpoint stays.
    """
    _check_installed(settings)
    rows = [load_conversations(path) for path in (data, alignment) if path is not None]
    directory = FinetuneDirectory(out)
    with directory.nothing_left():
        model, tokenizer = load_model(base), load_tokenizer(base)
        _check_model(model, base)
        limit = min(settings.max_length, positions(model) or settings.max_length)
        (user, cut), *aligned = [token_rows(model, tokenizer, each, limit) for each in rows]
        safe, cut_too = aligned[0] if aligned else ([], 0)
        schedule = settings.schedule(len(user), bool(safe))
        if torch.cuda.is_available():
            model.to("cuda")  # type: ignore[arg-type]
        band = _band(directory, model, tokenizer, choose_band)
        trained = _prepared(model, band, settings)
        checkpoint = directory.last_checkpoint()
        if checkpoint is None:
            _check_space(trained, settings, out)
        kept = settings.to_dict() | {"band": band_as_given, "lisa": asdict(schedule), "base": files_digest(base)}
        kept |= {"data": _digest(data), "alignment": alignment and _digest(alignment)}
        directory.settle(kept, band)
    trainer = _trainer(trained, directory, settings, schedule, user, safe, progress)
    with _writing(out):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        done = _done(trainer, checkpoint, schedule, band, cut + cut_too)
        _save(trained, base, directory)
        record = {"fastlock": __version__, **kept, **done.to_dict(), "base": str(base)}
        directory.finish(record | {"log": trainer.state.log_history})
    return done


def _check_installed(settings: FinetuneSettings) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UnsupportedError(
            "WORLD_SIZE is set, and this is for one process. For several GPUs, use fastlock.lisa(trl.SFTTrainer)."
        )
    for name in ("accelerate", "peft") if settings.lora else ("accelerate",):
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError(f"{name} is not installed. Install it: pip install 'fastlock[finetune]'.")


def _check_model(model: Any, base: Path) -> None:
    check_unlocked(model, "fine-tuning would change what the lock is folded from", name=str(base))
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(
            f"{base}: its weights are in {str(model.dtype).removeprefix('torch.')}, and are trained in float32 or "
            "bfloat16. Convert them: model.to(torch.bfloat16).save_pretrained(DIR)."
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _band(directory: FinetuneDirectory, model: Any, tokenizer: Any, choose_band: BandChoice | None) -> Band | None:
    """The band of the run, which is chosen once."""
    if choose_band is None:
        return None
    if directory.band.exists():
        return Band.load(directory.band)
    return choose_band(model, tokenizer)


def _prepared(model: Any, band: Band | None, settings: FinetuneSettings) -> Any:
    """The model with its band frozen, or with adapters outside it."""
    torch.manual_seed(settings.seed)
    if settings.lora is None:
        if band is not None:
            freeze(model, band)
        return model
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"r": settings.lora, "lora_alpha": 2 * settings.lora, "task_type": "CAUSAL_LM"}
    if band is not None:
        return get_peft_model(model, lora_outside(band, model=model, **options))
    return get_peft_model(model, LoraConfig(target_modules="all-linear", **options))


def _trainer(
    model: Any,
    directory: FinetuneDirectory,
    settings: FinetuneSettings,
    schedule: Lisa,
    user: list[TokenRow],
    safe: list[TokenRow],
    progress: Progress,
) -> Any:
    mixed = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and model.dtype == torch.float32
    args = transformers.TrainingArguments(
        str(directory.training),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        logging_steps=_LOG_EVERY,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=1,
        seed=settings.seed,
        bf16=mixed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    args._n_gpu = min(args.n_gpu, 1)
    trainer = lisa(transformers.Trainer)(
        model,
        args,
        data_collator=padded,
        train_dataset=user,
        alignment_dataset=safe,
        lisa=schedule,
        optimizer_cls_and_kwargs=(ProximalAdamW, _optimizer_settings(model, settings)),
        callbacks=[TrainingWatch(progress)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _optimizer_settings(model: Any, settings: FinetuneSettings) -> dict[str, Any]:
    """Small steps are not lost in bfloat16 weights: their moments are float32, and weights are rounded at random."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "pull": 0.0}
    if all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad):
        options |= {"state_dtype": torch.float32, "stochastic_rounding": True, "seed": settings.seed}
    return options


def _check_space(model: Any, settings: FinetuneSettings, out: Path) -> None:
    """Refuse a disk on which two checkpoints and the result have no room."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(p.numel() * (2 * 4 + 2 * p.element_size()) for p in trained)
    needed = 2 * (state + (weights if settings.lora is None else 0)) + weights
    free = shutil.disk_usage(out).free
    if free < needed:
        raise FastlockError(
            f"{out}: {free / 1e9:.1f} GB are free there, and two checkpoints and the result take about "
            f"{needed / 1e9:.1f} GB. Free some space, or give a directory on another disk."
        )


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say what to do where disk or memory run out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FastlockError(
            f"memory runs out ({str(error).splitlines()[0]}). Give a smaller --batch-size and a larger --accumulate, a "
            "smaller --max-length, or --lora; and another directory."
        ) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save says of a full disk only that its writer failed.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise FastlockError(
            f"{out}: cannot be written ({str(error).splitlines()[0]}). Free some space, and give the same command "
            "again: it goes on from the last checkpoint."
        ) from error


def _done(trainer: Any, checkpoint: Path | None, schedule: Lisa, band: Band | None, cut: int) -> Finetuned:
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise not_finite(f"{name} has numbers that are none")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    resumed_at = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return Finetuned(trainer.state.global_step, resumed_at, schedule, band, cut, first, last)


def _save(trained: Any, base: Path, directory: FinetuneDirectory) -> None:
    """The model as a plain checkpoint, with the base's own tokenizer."""
    result = directory.new_result()
    model = trained.merge_and_unload() if hasattr(trained, "peft_config") else trained
    model.save_pretrained(result)
    for pattern in _TOKENIZER_FILES:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, result / path.name)
