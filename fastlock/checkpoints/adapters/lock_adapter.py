"""A gate as an adapter by itself: a LoRA of the checkpoint that is to be locked, which stays as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fastlock.architectures.serving_stacks import DEFAULT_STACKS, check_stacks
from fastlock.checkpoints.adapters.adapter import Adapter
from fastlock.checkpoints.adapters.carriers.adapter_gate import ADAPTER_GATE
from fastlock.checkpoints.adapters.carriers.carrier import AdapterJob, OpenedBase
from fastlock.checkpoints.adapters.relocked_base import open_base
from fastlock.checkpoints.adapters.relocking import AdapterSettings, write_relocked
from fastlock.checkpoints.adapters.unlocking import local_only
from fastlock.checkpoints.gguf import is_gguf
from fastlock.errors import UnsupportedError
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.locks.lock import Lock, check_lock
from fastlock.storage.new_directory import check_paths


def relock_as_adapter(
    checkpoint: str | os.PathLike[str],
    lock: Lock,
    out: str | os.PathLike[str],
    strength: float | None = None,
    *,
    stacks: Sequence[str] = DEFAULT_STACKS,
) -> AdapterReceipt:
    """Write a lock's gate as a PEFT LoRA of a checkpoint, which is only read: A = Vᵀ, B = s·W U, scale 1, float32.

    Stacks that load LoRAs serve the lock with it, request by request, over the checkpoint as it is. A request without
    it gets the baseline. It adapts the output projections of the locked layers alone, and is of the gate's rank. Of a
    quantised checkpoint, W is what its numbers stand for. An adapter has a gate put into it by `relock_adapter`.

    Args:
        checkpoint: its directory or URL; it must not be relocked.
        lock: a lock with a gate and without a constant part.
        out: the directory to make; it must not exist yet.
        strength: a finite number, 0 or more; by default as for `fastlock.relock`.
        stacks: the serving stacks in which the lock is to act: for the receipt, as every stack loads it.

    Returns:
        What was done.

    Raises:
        UnsupportedError: the lock has no gate, or a constant part, or the checkpoint is relocked; the family is
            refused, or the weights are of a format that fastlock does not read.
        DamagedError: the checkpoint is damaged, hostile, or was changed meanwhile.
        MismatchError: the lock is of another geometry.
        FastlockError: an argument is wrong, the strength is too large, or the file system refuses.

    After an error `out` does not exist.
    """
    check_lock(lock)
    settings = AdapterSettings(check_stacks(stacks))
    if is_gguf(checkpoint):
        raise UnsupportedError(
            f"{checkpoint}: is a GGUF. Make the adapter of the checkpoint that it was converted from, and convert that "
            "with llama.cpp's convert_lora_to_gguf.py (--base CHECKPOINT)."
        )
    source, target = check_paths(checkpoint, out, False)
    directory = local_only(target)
    base = open_base(checkpoint, lock, strength)
    job = AdapterJob(nothing_yet(base), base)
    for stack in settings.stacks:
        if (objection := ADAPTER_GATE.objection(job, stack)) is not None:
            raise UnsupportedError(
                f"{base.part.checkpoint.where}: this lock cannot be an adapter of it: {objection}. Relock the "
                "checkpoint itself (fastlock.relock_checkpoint; on the command line, leave out --as). Nothing was "
                "written."
            )
    return write_relocked(job, ADAPTER_GATE, settings, source, directory)


def nothing_yet(base: OpenedBase) -> Adapter:
    """A LoRA of a base that adapts nothing: what a gate is put into to be one by itself."""
    part = base.part
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.place),
        "r": part.lock.rank,
        "lora_alpha": part.lock.rank,
        "lora_dropout": 0.0,
        "target_modules": [],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": part.checkpoint.family.transposed,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    return Adapter(part.checkpoint.where, {}, config, "LORA", str(base.place), {}, {})
