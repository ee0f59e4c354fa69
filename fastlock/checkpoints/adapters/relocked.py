"""What a relocked adapter's directory holds, whether it is still what fastlock wrote, and what it was before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES, open_adapter
from fastlock.checkpoints.adapters.adapter_files import (
    ORIGINAL_CONFIG,
    ORIGINAL_HEADER,
    ORIGINAL_WEIGHTS,
    SIDECAR,
    header_of,
    without_tensors,
)
from fastlock.checkpoints.layout import ASIDE
from fastlock.checkpoints.tensor_index import MAX_HEADER_BYTES, read_header
from fastlock.errors import DamagedError, FastlockError, shown
from fastlock.locks.adapter_receipt import ADAPTER_RECEIPT, AdapterReceipt
from fastlock.storage.files import File, parse_object, read_all


def adapter_receipt_in(files: Mapping[str, File], where: str) -> AdapterReceipt | None:
    """The receipt in an adapter's directory, None where it has none.

    Raises:
        UnsupportedError: it is of a newer format.
        DamagedError: it is damaged.
    """
    if ADAPTER_RECEIPT not in files:
        return None
    place = f"{where}/{ADAPTER_RECEIPT}"
    return AdapterReceipt.from_dict(parse_object(read_all(files[ADAPTER_RECEIPT], place), place), place)


def digest_of_adapter_file(name: str, file: File, where: str) -> str:
    """SHA-256 of a small file of an adapter; of its weights, that of their header, with the length before it."""
    if name == ADAPTER_WEIGHTS:
        return hashlib.sha256(header_of(file)).hexdigest()
    return hashlib.sha256(read_all(file, f"{where}/{name}", MAX_CONFIG_BYTES)).hexdigest()


def rewritten_since(files: Mapping[str, File], receipt: AdapterReceipt, where: str) -> str | None:
    """A file that is not the one that fastlock wrote, None where all are; PEFT writes config and weights anew."""
    for name, digest in receipt.written.items():
        if name not in files or digest_of_adapter_file(name, files[name], where) != digest:
            return name
    return None


def original_adapter_files(files: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The files of a relocked adapter's directory as they were before; those of any other directory as they are.

    Raises:
        UnsupportedError: its receipt is of a newer format.
        DamagedError: it was changed since it was relocked.
        FastlockError: it was no adapter before, but is a lock of its own.
    """
    receipt = adapter_receipt_in(files, where)
    if receipt is None:
        return dict(files)
    if is_lock_alone(receipt):
        raise FastlockError(
            f"{where}: is a lock as an adapter, and was none before: nothing else is in it to unlock or relock. For "
            "another lock or strength, make another one (fastlock relock BASE --lock LOCK --as adapter); to do "
            f"without, serve {shown(receipt.base.name)} alone."
        )
    if (name := rewritten_since(files, receipt, where)) is not None:
        raise changed_adapter(where, f"{shown(name)} is not the one that fastlock wrote")
    view = {name: file for name, file in files.items() if name not in (ADAPTER_RECEIPT, SIDECAR)}
    for name in [name for name in view if name.startswith(ASIDE)]:
        view[name.removeprefix(ASIDE)] = view.pop(name)
    if ADAPTER_CONFIG in receipt.original:
        _check_original(files, ORIGINAL_CONFIG, receipt.original[ADAPTER_CONFIG], where)
    if ADAPTER_WEIGHTS in receipt.original and receipt.rank:
        check_set_aside(files, receipt, where)
    elif ADAPTER_WEIGHTS in receipt.original:
        _check_original(files, ORIGINAL_HEADER, receipt.original[ADAPTER_WEIGHTS], where)
        view[ADAPTER_WEIGHTS] = _original_weights(files, receipt, where)
        view.pop(ORIGINAL_HEADER.removeprefix(ASIDE))
    return dict(sorted(view.items()))


def is_lock_alone(receipt: AdapterReceipt) -> bool:
    """Whether a relocked adapter is a lock alone, and was no adapter before."""
    return ADAPTER_WEIGHTS in receipt.written and ADAPTER_WEIGHTS not in receipt.original


def check_set_aside(files: Mapping[str, File], receipt: AdapterReceipt, where: str) -> None:
    """Whether config and weights that were set aside whole are those of which a receipt speaks.

    Raises:
        DamagedError: one is missing, or is another.
    """
    for name in (ORIGINAL_CONFIG, ORIGINAL_WEIGHTS):
        own = name.removeprefix(ASIDE)
        if name not in files or digest_of_adapter_file(own, files[name], where) != receipt.original[own]:
            raise _not_set_aside(where, name)


def _check_original(files: Mapping[str, File], name: str, digest: str, where: str) -> None:
    if name not in files or hashlib.sha256(read_all(files[name], name, MAX_HEADER_BYTES + 8)).hexdigest() != digest:
        raise _not_set_aside(where, name)


def _not_set_aside(where: str, name: str) -> DamagedError:
    return DamagedError(
        f"{where}/{name}: is not what was set aside when the adapter was relocked, which therefore cannot be put back. "
        "Start from the original adapter."
    )


def _original_weights(files: Mapping[str, Any], receipt: AdapterReceipt, where: str) -> Any:
    header, file = read_all(files[ORIGINAL_HEADER], ORIGINAL_HEADER, MAX_HEADER_BYTES + 8), files[ADAPTER_WEIGHTS]
    read_header(file, ADAPTER_WEIGHTS, where)
    try:
        original = without_tensors(file, header, ())
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise changed_adapter(where, f"its first header does not fit ({error})") from None
    if not receipt.original_biases:
        return original
    adapter = open_adapter({ADAPTER_CONFIG: files[ADAPTER_CONFIG], ADAPTER_WEIGHTS: original}, where)
    patches = []
    for site in receipt.sites:
        if (bias := receipt.original_biases.get(site.layer)) is None:
            continue
        stored = adapter.modules.get(site.name, {}).get("lora_B.bias")
        if stored is None or stored.length != len(bias):
            raise changed_adapter(where, f"its receipt does not hold the first bias of layer {site.layer}")
        patches.append((stored.start, bias))
    return original.patched(patches)


def changed_adapter(where: str, change: str) -> DamagedError:
    """The error that says so."""
    return DamagedError(
        f"{where}: was changed since it was relocked ({change}), and putting the original back would lose that change. "
        "Start from the original adapter."
    )
