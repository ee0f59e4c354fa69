"""Whether a checkpoint's lock really acts in a given serving stack, read off its files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastlock.architectures.serving_stacks import DEFAULT_STACKS, check_stacks, named_architecture, needs, why_lost
from fastlock.checkpoints.adapters.adapter_files import holds_adapter_only
from fastlock.checkpoints.adapters.diagnosis import examine_adapter
from fastlock.checkpoints.carrier import choose_carrier
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.finding import Finding
from fastlock.checkpoints.gguf import gguf_state, is_gguf
from fastlock.checkpoints.layout import bypass
from fastlock.checkpoints.quantised.in_stacks import note_on
from fastlock.checkpoints.relocked import receipt_in, stored_biases
from fastlock.errors import FastlockError, UnsupportedError, shown
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import Receipt
from fastlock.storage.places import as_place, files_in


def doctor(
    directory: str | os.PathLike[str],
    stacks: Sequence[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    lock: Lock | None = None,
) -> Sequence[Finding]:
    """What each stack makes of a checkpoint's lock; if it has none, how it would be carried there.

    No weights are read: whether the biases are right is for `verify` to say.

    Args:
        directory: the checkpoint's directory or URL, or a GGUF file.
        stacks: the serving stacks to look at, of "transformers", "vllm", "sglang" and "llama.cpp"; by default the first
            two, of a GGUF the last.
        base: of an adapter, the directory or URL of its base; by default the one that it names.
        lock: of an adapter, a lock: then a finding says which carriers keep it, and how far the base's own fold is off.

    Returns:
        A finding for each stack; of an adapter it also says its method, what it touches, and its scales.

    Raises:
        UnsupportedError: the checkpoint is of a family without an exact fold, or in another format.
        DamagedError: the checkpoint is damaged.
        FastlockError: a stack is unknown, or the checkpoint cannot be read.
    """
    where = str(directory)
    if is_gguf(directory):
        _check_given_alone(base, lock, where)
        return [_of_gguf(directory, stack) for stack in check_stacks(("llama.cpp",) if stacks is None else stacks)]
    stacks = DEFAULT_STACKS if stacks is None else stacks
    files = files_in(as_place(directory))
    if holds_adapter_only(files):
        return examine_adapter(files, where, check_stacks(stacks), base, lock)
    _check_given_alone(base, lock, where)
    saved = receipt_in(files, where)
    checkpoint = Checkpoint(files, where)
    return [
        _of_unlocked(checkpoint, stack) if saved is None else _of_relocked(checkpoint, saved.receipt, stack)
        for stack in check_stacks(stacks)
    ]


def _check_given_alone(base: object, lock: Lock | None, where: str) -> None:
    if base is not None or lock is not None:
        raise FastlockError(f"{where}: is no adapter, and is examined without a base and a lock. Leave them out.")


def _of_gguf(path: str | os.PathLike[str], stack: str) -> Finding:
    state = gguf_state(path, stack)
    return Finding(stack, state.acts, state.reason)


def _of_unlocked(checkpoint: Checkpoint, stack: str) -> Finding:
    try:
        carrier = choose_carrier(checkpoint, (stack,))
    except UnsupportedError as error:
        return Finding(stack, False, f"not relocked, and cannot be for {stack}: {error}")
    if biases := carrier.switched_off(checkpoint):
        return Finding(
            stack,
            False,
            f"the files hold biases that the config switches off ({shown(biases[0])}, {len(biases)} in all): if they "
            "are a lock's, it is lost. Save a relocked model with its own save_pretrained",
        )
    of_format = _of_format(checkpoint, stack)
    return Finding(
        stack, False, f"not relocked; for {stack} the lock would be carried in {carrier.form} form{of_format}"
    )


def _of_relocked(checkpoint: Checkpoint, receipt: Receipt, stack: str) -> Finding:
    if not receipt.constant:
        return _of_gate_alone(checkpoint, receipt, stack)
    model_type = checkpoint.model_type
    lost = why_lost(model_type, stack, checkpoint.text_config, named_architecture(checkpoint.raw))
    if lost is not None:
        return Finding(stack, False, lost)
    if (unlocked := bypass(checkpoint.files, checkpoint.shards.files)) is not None:
        return Finding(stack, False, f"{unlocked}: move it away")
    if any(bias is None for bias in stored_biases(checkpoint, receipt)):
        return Finding(stack, False, "the files lack a locked layer's bias: run `fastlock verify`")
    lacking = [
        f"{path}.bias"
        for path in checkpoint.modules(needs(model_type, stack))
        if f"{path}.bias" not in checkpoint.shards.tensors
    ]
    if lacking:
        return Finding(
            stack, False, f"the files lack {lacking[0]} ({len(lacking)} in all), which {stack} leaves undefined"
        )
    of_format = _of_format(checkpoint, stack)
    what = "biases and the rewritten weights" if receipt.rank else "biases"
    return Finding(stack, True, f"{stack} uses the {what} of all {len(receipt.layers)} locked layers{of_format}")


def _of_gate_alone(checkpoint: Checkpoint, receipt: Receipt, stack: str) -> Finding:
    """Every stack uses the weights: nothing but other weights beside them can be in the way."""
    if (unlocked := bypass(checkpoint.files, checkpoint.shards.files)) is not None:
        return Finding(stack, False, f"{unlocked}: move it away")
    return Finding(stack, True, f"{stack} uses the rewritten weights of all {len(receipt.layers)} locked layers")


def _of_format(checkpoint: Checkpoint, stack: str) -> str:
    """What is to be known of a quantised checkpoint in a stack, to go on with; "" of any other."""
    layout = checkpoint.quantised_format
    return "" if layout is None else f" ({layout}: {note_on(layout, stack)})"
