"""`fastlock relock`: a checkpoint, an adapter or a GGUF relocked into a new directory or file, or in place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastlock.cli.commands import ArgumentsError, Command, option
from fastlock.cli.options import (
    CHECKPOINT,
    COPY,
    FOR,
    IN_PLACE,
    JSON,
    LOCK,
    OUT,
    STRENGTH,
    YES,
    check_gguf_options,
    stack_names,
    target,
)
from fastlock.cli.output import print_json, say, spinner

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.locks.adapter_receipt import AdapterReceipt
    from fastlock.locks.lock import Lock
    from fastlock.locks.receipt import Receipt


def _relock(
    checkpoint: str,
    lock: Path,
    out: str | None,
    strength: float | None,
    stacks: list[tuple[str, ...]] | None,
    copy: bool,
    in_place: bool,
    yes: bool,
    as_json: bool,
    base: str | None,
    carrier: str | None,
    gap: float | None,
    relocked_base: str | None,
    form: str | None,
) -> None:
    destination = target(checkpoint, out, in_place, yes)
    from fastlock.locks.lock import Lock

    loaded = Lock.load(lock)
    settings = {"stacks": stacks, "strength": strength, "copy": copy, "base": base, "form": form}
    of_adapter = {"carrier": carrier, "gap": gap, "relocked_base": relocked_base}
    start = time.perf_counter()
    with spinner(f"relocking {checkpoint}", as_json):
        receipt, advice = _relocked(checkpoint, loaded, destination, in_place, settings, of_adapter)
    if as_json:
        print_json({"out": destination, "receipt": receipt.to_dict()})
        return
    seconds = time.perf_counter() - start
    say(f"{destination}: {len(receipt.layers)} layers relocked at strength {receipt.strength:g} ({seconds:.1f} s)")
    if advice:
        say(advice)


def _relocked(
    source: str, lock: Lock, out: str, in_place: bool, settings: dict[str, Any], of_adapter: dict[str, Any]
) -> tuple[Receipt | AdapterReceipt, str]:
    """The receipt of a checkpoint, a GGUF or an adapter, and what is to be done with the result."""
    from fastlock.checkpoints.adapters.adapter_files import is_adapter
    from fastlock.checkpoints.gguf import is_gguf, relock_gguf
    from fastlock.checkpoints.relocking import relock_checkpoint

    stacks, strength, copy, base = (settings[name] for name in ("stacks", "strength", "copy", "base"))
    if settings["form"] is not None:
        if in_place or copy or base is not None or any(value is not None for value in of_adapter.values()):
            raise ArgumentsError("--as adapter is for a checkpoint that stays as it is. Give --lock and --out alone.")
        return _relocked_as_adapter(source, lock, out, strength, stack_names(stacks))
    if base is not None and is_adapter(source):
        if in_place or copy:
            raise ArgumentsError("an adapter is relocked into a new directory. Leave out --in-place and --copy.")
        return _relocked_adapter(source, base, lock, out, strength, stacks=stack_names(stacks), **of_adapter)
    if any(value is not None for value in of_adapter.values()):
        raise ArgumentsError("--carrier, --gap and --relocked-base are for adapters: give an adapter, and its --base.")
    if is_gguf(source):
        check_gguf_options(source, in_place, stacks)
        return relock_gguf(source, lock, out, strength, copy=copy, base=base), ""
    kinds = {"stacks": stack_names(stacks), "copy": copy, "in_place": in_place, "base": base}
    return relock_checkpoint(source, lock, out, strength, **kinds), ""


def _relocked_adapter(
    adapter: str, base: str, lock: Lock, out: str, strength: float | None, **settings: Any
) -> tuple[AdapterReceipt, str]:
    from fastlock.checkpoints.adapters.carriers.table import CARRIERS_OF_ADAPTERS
    from fastlock.checkpoints.adapters.relocking import relock_adapter

    receipt = relock_adapter(adapter, base, lock, out, strength, **settings)
    advice = CARRIERS_OF_ADAPTERS[receipt.carrier].advice.format(base=receipt.base.name)
    gaps = [site.gap for site in receipt.sites if site.gap is not None]
    off = f" The base's own fold is off by at most {max(gaps):.2%}." if receipt.allowed_gap is not None else ""
    return receipt, f"{receipt.carrier}: {advice}{off}"


def _relocked_as_adapter(
    checkpoint: str, lock: Lock, out: str, strength: float | None, stacks: tuple[str, ...]
) -> tuple[AdapterReceipt, str]:
    from fastlock.checkpoints.adapters.carriers.adapter_gate import ADAPTER_GATE
    from fastlock.checkpoints.adapters.lock_adapter import relock_as_adapter

    receipt = relock_as_adapter(checkpoint, lock, out, strength, stacks=stacks)
    return receipt, f"{receipt.carrier}: {ADAPTER_GATE.advice.format(base=receipt.base.name)}"


COMMAND = Command(
    "relock",
    "Relock a checkpoint into a new directory, which links its weights; an adapter, over its base; or a GGUF file, for "
    "llama.cpp.",
    (
        CHECKPOINT,
        LOCK,
        OUT,
        STRENGTH,
        FOR,
        COPY,
        IN_PLACE,
        YES,
        JSON,
        option(
            "--base",
            metavar="DIR",
            help="For an adapter: the base that it is served over, or its URL. For a checkpoint or a GGUF: the "
            "lock's aligned base, a checkpoint, to make sure that quantised heads are still what the lock knows.",
        ),
        option(
            "--carrier",
            metavar="NAME",
            help="For an adapter: how it gets its lock (base bias, adapter bias, adapter gate, merge, sidecar). "
            "Default: the first that is exact in every stack.",
        ),
        option(
            "--gap",
            type=float,
            metavar="G",
            help="For an adapter: let a relocked base serve it although its fold is only nearly exact, off by at "
            "most G in each layer (0.02: two per cent).",
        ),
        option(
            "--relocked-base",
            metavar="DIR",
            help="For an adapter: where its relocked base is, or is to be made, if it needs one. Default: "
            "BASE-locked, beside --out.",
        ),
        option(
            "--as",
            dest="form",
            metavar="adapter",
            choices=("adapter",),
            help="For a checkpoint, with a lock that is a gate alone: leave it as it is, and write the lock as a LoRA, "
            "which servers load beside it.",
        ),
    ),
    _relock,
)
