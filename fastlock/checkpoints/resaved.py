"""Checkpoints that transformers saved from a relocked model: the biases are among its other weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from fastlock.architectures.serving_stacks import named_architecture
from fastlock.checkpoints.carrier import Carrier
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.config import read_config
from fastlock.checkpoints.layout import ASIDE, Placement, is_private, is_small, placements_of
from fastlock.checkpoints.model_card import CARD, with_section, without_section
from fastlock.checkpoints.relocked import carry, receipt_in
from fastlock.checkpoints.tensor_index import INDEX, read_shards
from fastlock.checkpoints.tokenizer import versions_in
from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import KnownDigests, Receipt, SavedReceipt
from fastlock.models.loading import load_model
from fastlock.models.relocking import relock, unlock
from fastlock.models.saving import in_class
from fastlock.storage.files import CONFIG, read_all
from fastlock.storage.local import local_files
from fastlock.storage.new_directory import create_local_directory
from fastlock.storage.places import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def out_of_llama_form(model: PreTrainedModel, original: Any, source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model in the class that it had before it was saved as a Llama.

    Args:
        model: the Llama, unlocked.
        original: the config.json that the model had before, as its receipt says.
        source: the checkpoint's directory, for messages.

    Raises:
        DamagedError: that config does not fit the model.
    """
    from transformers import AutoConfig, MistralForCausalLM, Qwen2ForCausalLM

    classes: dict[str, Callable[[Any], PreTrainedModel]] = {"mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    try:
        model_type = original["model_type"]
        config = AutoConfig.for_model(**original)
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not (name.endswith(".self_attn.o_proj.bias") and not tensor.count_nonzero())
        }
        restored = in_class(classes[model_type], config, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(
            f"{source}: what the receipt says of the original model cannot be true ({type(error).__name__}: "
            f"{str(error)[:200]}). Start from the original checkpoint."
        ) from None
    restored.generation_config = model.generation_config
    return restored


def relock_saved(
    source: Place, lock: Lock, out: Place, strength: float, in_place: bool, stacks: tuple[str, ...]
) -> Receipt:
    """Relock a checkpoint that transformers saved from a relocked model.

    Raises:
        UnsupportedError: it is at a URL.
        FastlockError: it cannot be loaded, was changed since it was relocked, or the lock does not fit.
    """
    source, out = _both_here(source, out)
    model = load_model(source)
    receipt = relock(model, lock, strength)
    receipt = replace(receipt, digests=KnownDigests(receipt.weights_digest, receipt.biases_digest))
    _save(model, source, out, in_place, receipt, stacks)
    return receipt


def unlock_saved(source: Place, out: Place, in_place: bool) -> None:
    """Unlock a checkpoint that transformers saved from a relocked model.

    Raises:
        UnsupportedError: it is at a URL.
        FastlockError: it is not relocked, cannot be loaded, or was changed since.
    """
    source, out = _both_here(source, out)
    saved = receipt_in(local_files(source), str(source))
    if saved is None:
        raise FastlockError(f"{source}: is not relocked: it has no receipt. There is nothing to unlock.")
    check_without_gate(saved, str(source))
    model = load_model(source)
    unlock(model)
    if saved.carrier.form == "llama":
        model = out_of_llama_form(model, saved.carrier.original_config, source)
    _save(model, source, out, in_place, None, ())


def check_without_gate(saved: SavedReceipt | None, where: str, lock: Lock | None = None) -> None:
    """Refuse a checkpoint that transformers saved with a gate in its weights, or that is to get one.

    Raises:
        UnsupportedError: it is one, or this lock has a gate.
    """
    if saved is not None and saved.receipt.rank:
        raise UnsupportedError(
            f"{where}: was saved by transformers with the gate of a lock in its weights, and the weights "
            "that were there before are not with it: neither unlocking nor another lock is possible. Start from the "
            "directory that was loaded and saved: if `fastlock relock` wrote it, it keeps what was there before. Or "
            "start from the original checkpoint. Nothing was written."
        )
    if lock is not None and lock.rank:
        raise UnsupportedError(
            f"{where}: was saved by transformers from a relocked model, and this lock has a gate, which is "
            "written into weights. `fastlock unlock` it first, and relock the result. Nothing was written."
        )


def check_saved(checkpoint: Checkpoint, carrier: Carrier) -> None:
    """Raise an UnsupportedError if transformers, which will save it, would not write what the carrier needs."""
    needed = named_architecture(carrier.config)
    if named_architecture(checkpoint.raw) != needed:
        raise UnsupportedError(
            f"{checkpoint.where}: was saved by transformers from a relocked model; vllm keeps the lock only if "
            f"{CONFIG} names {needed}, which transformers does not write. `fastlock unlock` it first and relock the "
            "result, or relock it --for transformers. Nothing was written."
        )


def _both_here(source: Place, out: Place) -> tuple[Path, Path]:
    if isinstance(source, str) or isinstance(out, str):
        raise UnsupportedError(
            f"{source}: was saved by transformers from a relocked model, and has to be loaded and written anew as a "
            "whole. Download it, do this on local directories, and upload the result."
        )
    return source, out


def _save(
    model: Any, source: Path, out: Path, in_place: bool, receipt: Receipt | None, stacks: tuple[str, ...]
) -> None:
    """Save a model, with everything else that is in the directory that it was loaded from.

    Args:
        model: relocked or unlocked.
        source, out, in_place: as for `relock_checkpoint`.
        receipt: what was done; None if it was unlocked, and what was set aside comes back.
        stacks: for the model card.
    """
    files = local_files(source)
    shards = read_shards(dict(files), str(source)).files
    with create_local_directory(out, source, in_place) as new:
        try:
            model.save_pretrained(new.path)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from None
        new.sync()
        anew = {*shards, INDEX, CARD, *local_files(new.path), *versions_in(read_config(files, str(source)))}
        placements = placements_of(files, shards, in_place) if receipt is not None else None
        for name in sorted(files, key=lambda name: not name.startswith(ASIDE)):  # what is set aside is the original's
            target = _saved_name(name, placements, in_place)
            if target is not None and not {name, target} & anew:
                carry(new, target, files[name], not target.startswith(ASIDE) or is_small(name, files[name]))
                anew.add(target)
        card = without_section(read_all(files[CARD], CARD)) if CARD in files else None
        if receipt is not None:
            card = with_section(card, receipt, stacks)
        if card is not None:
            new.write(CARD, card)


def _saved_name(name: str, placements: Mapping[str, Placement] | None, in_place: bool) -> str | None:
    """The name of a file that is not saved anew, None if it stays behind; `placements` if it is relocked."""
    if is_private(name) and not in_place:
        return None
    if name.startswith(ASIDE):
        return name.removeprefix(ASIDE) if placements is None else name
    return name if placements is None else placements[name].name
