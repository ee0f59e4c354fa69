"""An adapter on disk, relocked into a new directory, from its own tensors and its base's locked columns alone.

The adapter is only read. Of what did not change, large files are linked and small ones copied.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastlock.architectures.adapter_stacks import ADAPTER_STACKS
from fastlock.architectures.serving_stacks import DEFAULT_STACKS, check_stacks
from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from fastlock.checkpoints.adapters.adapter_files import (
    ORIGINAL_CONFIG,
    ORIGINAL_HEADER,
    ORIGINAL_WEIGHTS,
    adapter_placements,
    header_of,
    needs_adapter_name,
)
from fastlock.checkpoints.adapters.carriers.base_bias import BASE_BIAS
from fastlock.checkpoints.adapters.carriers.carrier import AdapterCarrier, AdapterJob, Carried, OpenedBase
from fastlock.checkpoints.adapters.carriers.table import choose_adapter_carrier
from fastlock.checkpoints.adapters.folding import AdapterFold
from fastlock.checkpoints.adapters.merging import write_merged
from fastlock.checkpoints.adapters.relocked import digest_of_adapter_file, original_adapter_files
from fastlock.checkpoints.adapters.relocked_base import check_quantisation, check_shapes, open_base, relocked_base
from fastlock.checkpoints.adapters.unlocking import local_only, put
from fastlock.checkpoints.layout import MAX_COPIED_BYTES
from fastlock.checkpoints.relocking import relock_checkpoint
from fastlock.dtypes import torch_name
from fastlock.errors import FastlockError
from fastlock.locks.adapter_receipt import ADAPTER_RECEIPT, AdapterBase, AdapterReceipt, AdapterSite
from fastlock.locks.lock import Lock, check_lock
from fastlock.locks.receipt import biases_digest, raw_bytes, weights_digest
from fastlock.storage.files import InMemoryFile, read_all
from fastlock.storage.new_directory import NewDirectory, check_not_in_the_way, check_paths, create_local_directory
from fastlock.storage.places import Place, files_in

# Where an adapter is merged into its base, in the directory that is being made: no file of a base has that name.
_WORKSHOP = "model-fastlock-merged"


@dataclass(frozen=True)
class AdapterSettings:
    """How adapters are to be relocked: as the arguments of `relock_adapter`."""

    stacks: tuple[str, ...] = DEFAULT_STACKS
    carrier: str | None = None
    gap: float | None = None
    relocked_base: str | os.PathLike[str] | None = None


def relock_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    lock: Lock,
    out: str | os.PathLike[str],
    strength: float | None = None,
    *,
    stacks: Sequence[str] = DEFAULT_STACKS,
    carrier: str | None = None,
    gap: float | None = None,
    relocked_base: str | os.PathLike[str] | None = None,
) -> AdapterReceipt:
    """Relock a PEFT adapter into a new directory: what the lock does to the adapted model, exactly, over its base.

    The first carrier that is exact in all of the stacks brings it: a base relocked once for all adapters that leave the
    locked projections alone; a bias in the adapter itself (transformers, PEFT); of a lock that is a gate alone, further
    rows of a LoRA's own A and B; else the adapter is merged into its base, if that is not quantised, and the result is
    relocked: a whole checkpoint. docs/adapters.md tells them apart.
    An adapter that is relocked already gets this lock instead of the earlier one.

    Args:
        adapter: the adapter's directory or URL, which is only read.
        base: the directory or URL of the base that it is served over, relocked or not.
        lock: the lock of the aligned base.
        out: the directory to make; it must not exist yet.
        strength: the paper's α, 0 or more; by default as for `fastlock.relock`.
        stacks: the serving stacks in which the lock must act, of "transformers", "vllm", "sglang" and "llama.cpp".
        carrier: "base bias", "adapter bias", "adapter gate", "merge" or "sidecar", instead of the first carrier that
            fits.
        gap: lets the base's own fold serve an adapter for which it is only nearly exact: how far it may be off in each
            layer, ‖f − W d‖ / ‖W d‖. How far it is, is in the receipt.
        relocked_base: where the base with the lock in its biases is, or is to be made, if the carrier needs it; by
            default beside `out`, under the base's name with "-locked" after it.

    Returns:
        What was done.

    Raises:
        UnsupportedError: no carrier keeps the lock in all of the stacks, the adapter's method has no exact fold, or the
            family has none.
        DamagedError: adapter or base are damaged, hostile, or were changed (since they were relocked, or meanwhile).
        MismatchError: the adapter is of another base, or the lock of another geometry.
        FastlockError: an argument is wrong, or the file system refuses.

    After an error `out` does not exist; a base that was relocked for it is complete, and stays.
    """
    check_lock(lock)
    settings = AdapterSettings(check_stacks(stacks), carrier, checked_gap(gap), relocked_base)
    source, target = check_paths(adapter, out, False)
    local_only(target)
    return relock_over(open_base(base, lock, strength), source, target, settings)


def relock_over(base: OpenedBase, source: Place, out: Place, settings: AdapterSettings) -> AdapterReceipt:
    """`relock_adapter` over a base that is open already, as one of many adapters.

    Args:
        base: of `open_base`.
        source, out: of `check_paths`.
        settings: the rest.
    """
    where, target = str(source), local_only(out)
    check_not_in_the_way(base.place, target)
    files = original_adapter_files(files_in(source), where)
    if (name := next(filter(needs_adapter_name, files), None)) is not None:
        raise FastlockError(
            f"{where}: holds {name[:200]!a}, and fastlock needs that name for its own files. Move it away. Nothing was "
            "written."
        )
    job = AdapterJob(open_adapter(files, where), base, settings.gap)
    check_quantisation(job.adapter, base)
    check_shapes(job.adapter, base)
    carrier = choose_adapter_carrier(job, settings.stacks, settings.carrier)
    if carrier is BASE_BIAS:
        locked = relocked_base(base, settings.stacks, settings.relocked_base, target)
        job = AdapterJob(job.adapter, locked, settings.gap)
    return write_relocked(job, carrier, settings, source, target)


def write_relocked(
    job: AdapterJob, carrier: AdapterCarrier, settings: AdapterSettings, source: Place, out: Path
) -> AdapterReceipt:
    """Write what a carrier makes of an adapter into a new directory.

    Args:
        job: the adapter.
        carrier: one that has no objection to it.
        settings: as the adapter was to be relocked.
        source: where it is.
        out: the directory to make.
    """
    if carrier.carry is None:
        return _relock_merged(job, carrier, out, settings)
    carried = carrier.carry(job, settings.stacks)
    written = _written(carried)
    receipt = _receipt(job, carrier, carried, settings, written)
    with create_local_directory(out, source, in_place=False) as new:
        _write(new, job, carried, written, receipt)
        job.adapter.check_unchanged()
        job.base.part.checkpoint.check_unchanged()
    return receipt


def _relock_merged(job: AdapterJob, carrier: AdapterCarrier, out: Path, settings: AdapterSettings) -> AdapterReceipt:
    """Merge an adapter into its base, and relock that: both where `out` is made, so that it appears with the lock."""
    part = job.base.part
    with create_local_directory(out, job.base.place, in_place=False) as new:
        merged = new.path / _WORKSHOP / "checkpoint"
        write_merged(job.adapter, part.checkpoint, job.base.place, merged)
        receipt = relock_checkpoint(merged, part.lock, merged, part.strength, stacks=settings.stacks, in_place=True)
        folds = job.folds()  # these read the base: once the new directory is in its place nothing may fail
        biases = [fold.bias.to(fold.site.dtype) for fold in folds]  # of which only the dtype is told
        carried = Carried(biases, [fold.path or fold.site.name for fold in folds], job.base.place)
        made = replace(_receipt(job, carrier, carried, settings, {}), biases_digest=receipt.biases_digest)
        _move_entries(merged, new.path)
        shutil.rmtree(merged.parent)  # with whatever could not be removed there before
    return made


def _move_entries(directory: Path, to: Path) -> None:
    """Move what a directory holds into another one.

    A directory that nobody may write to cannot be moved: it is made writable. Its permissions are the base's, and
    it gets them again when the new directory is complete.
    """
    for path in (directory, *directory.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.stat().st_mode & stat.S_IWUSR:
            path.chmod(0o700)
    for path in list(directory.iterdir()):
        path.rename(to / path.name)


def checked_gap(gap: Any) -> float | None:
    """The gap that was asked for.

    Raises:
        FastlockError: it is not a number above 0.
    """
    if gap is None:
        return None
    if type(gap) in (int, float) and math.isfinite(gap) and gap > 0:
        return float(gap)
    raise FastlockError(f"gap is {gap!r}; it must be a number above 0, such as 0.02.")


def _receipt(
    job: AdapterJob, carrier: AdapterCarrier, carried: Carried, settings: AdapterSettings, written: dict[str, Any]
) -> AdapterReceipt:
    part, folds, adapter = job.base.part, job.folds(carried.stack), job.adapter
    sites = tuple(
        AdapterSite(
            layer=fold.layer,
            name=name,
            heads=part.displacements[fold.layer].heads,
            touched=fold.touched,
            dtype=torch_name(bias.dtype),
            gap=None if part.lock.rank else _gap(fold),
            scale=fold.scale,
        )
        for fold, name, bias in zip(folds, carried.names, carried.biases, strict=True)
    )
    shared = carrier is BASE_BIAS and job.allowed_gap is not None and not folds.shares_base
    return AdapterReceipt(
        lock_digest=part.lock.digest,
        strength=part.strength,
        method=adapter.method,
        carrier=carrier.name,
        stacks=settings.stacks,
        base=AdapterBase(
            str(carried.base), part.checkpoint.model_type, weights_digest(fold.base_digest for fold in folds)
        ),
        sites=sites,
        adapter_digest=weights_digest(fold.digest for fold in folds),
        biases_digest=biases_digest(carried.biases),
        original_biases={layer: raw_bytes(bias) for layer, bias in carried.original_biases.items()},
        written={name: digest_of_adapter_file(name, file, adapter.where) for name, file in written.items()},
        original={
            name: digest_of_adapter_file(name, adapter.files[name], adapter.where)
            for name in written
            if name in adapter.files
        },
        scaling=None if all(fold.scale is None for fold in folds) else ADAPTER_STACKS[carried.stack].scaling,
        allowed_gap=job.allowed_gap if shared else None,
        rank=part.lock.rank,
    )


def _gap(fold: AdapterFold) -> float | None:
    if fold.shares_base:
        return 0.0
    gap = fold.gap
    return gap if math.isfinite(gap) else None


def _written(carried: Carried) -> dict[str, Any]:
    """The files that are written anew, by name."""
    written: dict[str, Any] = {name: InMemoryFile(data) for name, data in carried.files.items()}
    if carried.config is not None:
        written[ADAPTER_CONFIG] = InMemoryFile(_json(carried.config))
    if carried.weights is not None:
        written[ADAPTER_WEIGHTS] = carried.weights
    return written


def _write(
    new: NewDirectory, job: AdapterJob, carried: Carried, written: dict[str, Any], receipt: AdapterReceipt
) -> None:
    adapter = job.adapter
    steps: list[Callable[[], None]] = []
    for name, placed in adapter_placements(adapter.files).items():
        file: Any = adapter.files[name]
        if name not in written:
            copy = name == ADAPTER_CONFIG or file.size <= MAX_COPIED_BYTES
            steps.append(partial(put, new, placed, file, copy))
    for name, file in written.items():
        steps.append(partial(put, new, name, file, copy=True))
    if ADAPTER_CONFIG in receipt.original:
        config = read_all(adapter.files[ADAPTER_CONFIG], adapter.where)
        steps.append(partial(new.write, ORIGINAL_CONFIG, config))
    if carried.kept_whole:
        file = adapter.files[ADAPTER_WEIGHTS]
        steps.append(partial(put, new, ORIGINAL_WEIGHTS, file, copy=file.size <= MAX_COPIED_BYTES))
    elif ADAPTER_WEIGHTS in receipt.original:
        steps.append(partial(new.write, ORIGINAL_HEADER, header_of(adapter.files[ADAPTER_WEIGHTS])))
    steps.append(partial(new.write, ADAPTER_RECEIPT, _json(receipt.to_dict())))
    with ThreadPoolExecutor() as pool:  # each file is synced: the disk is waited for once, and not once a file
        for done in [pool.submit(step) for step in steps]:
            done.result()


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
