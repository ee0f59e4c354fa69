"""The base of adapters: opened once for all of them, and relocked once for those whose lock is in the base's biases."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlock.basis import check_likeness
from fastlock.checkpoints.adapters.adapter import Adapter
from fastlock.checkpoints.adapters.carriers.carrier import OpenedBase
from fastlock.checkpoints.adapters.folding import BasePart, base_part
from fastlock.checkpoints.base import Base, warn_unless_known
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.relocked import original_files, receipt_in, was_relocked_here
from fastlock.checkpoints.relocking import relock_checkpoint
from fastlock.errors import FastlockError, MismatchError, UnsupportedError, shown
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import weights_digest
from fastlock.storage.files import CONFIG, MAX_JSON_BYTES, parse_object, read_bounded
from fastlock.storage.places import Place, as_place, files_in, is_there


def open_base(
    base: str | os.PathLike[str], lock: Lock, strength: float | None = None, compared: bool = True
) -> OpenedBase:
    """Open the base of adapters, and compute W d at every locked layer.

    Args:
        base: its directory or URL. It may be relocked: its weights are read as they are, and its biases as they were.
        lock, strength: as for `fastlock.relock_checkpoint`.
        compared: whether its heads are compared with those that the lock was found in, as relocking does.

    Raises:
        UnsupportedError: transformers saved it from a relocked model, or it is as `fastlock.relock_checkpoint` refuses.
        FastlockError, and its other kinds: as for `fastlock.relock_checkpoint`.
    """
    place = _absolute(as_place(base))
    files, where = files_in(place), str(base)
    saved = receipt_in(files, where)
    if saved is not None and not was_relocked_here(files):
        raise UnsupportedError(
            f"{where}: was saved by transformers from a relocked model, so its first biases are not at hand. `fastlock "
            "unlock` it, and give the result. Nothing was written."
        )
    checkpoint = Checkpoint(original_files(files, where), where)
    part = base_part(checkpoint, lock, strength)
    if compared:
        _check_basis(part)
    return OpenedBase(place, part, saved)


def _check_basis(part: BasePart) -> None:
    """Refuse a base whose heads are not in the basis that the lock was found in, as relocking it would."""
    known = Base(part.lock.norms_by_layer())
    heads = {layer: displacement.heads for layer, displacement in part.displacements.items()}
    if known.is_known:
        likenesses = [known.likeness(site.layer, heads[site.layer], part.columns(site)) for site in part.sites]
        check_likeness(likenesses, part.checkpoint.where)
    warn_unless_known(known, part.checkpoint)


def relocked_base(
    base: OpenedBase, stacks: tuple[str, ...], given: str | os.PathLike[str] | None, out: Path
) -> OpenedBase:
    """The base with the lock in its biases: this one if it is relocked, else a relocked one, made where there is none.

    Args:
        base: as it was given.
        stacks: where the lock must act.
        given: where the relocked base is, or is to be made; by default beside `out`, under the base's name with
            "-locked" after it.
        out: where the adapter is to be made.

    Raises:
        FastlockError: there is something else at that place, or it cannot be written.
    """
    if base.carries_lock:
        if given is not None and _absolute(as_place(given)) != base.place:
            raise FastlockError(f"{base.place}: is relocked already. Leave out --relocked-base.")
        return base
    place: Place = out.parent / f"{Path(str(base.place)).name}-locked" if given is None else as_place(given)
    if isinstance(place, Path):
        place = place.absolute()
    if (place, stacks) not in base.locked:
        base.locked[place, stacks] = _locked_at(base, stacks, place)
    return base.locked[place, stacks]


def _locked_at(base: OpenedBase, stacks: tuple[str, ...], place: Place) -> OpenedBase:
    part = base.part
    if not is_there(place):
        relock_checkpoint(base.place, part.lock, place, part.strength, stacks=stacks)
        return replace(base, place=place, saved=receipt_in(files_in(place), str(place)), verified=[])
    found = open_base(place, part.lock, part.strength, compared=False)
    digests = [weights_digest(of.part.digests[site.layer] for site in part.sites) for of in (base, found)]
    carried = () if found.saved is None else found.saved.carrier.stacks or ()
    if not found.carries_lock or digests[0] != digests[1] or not set(stacks) <= set(carried):
        raise FastlockError(
            f"{place}: is there, and is not this base relocked with this lock, at strength {part.strength:g}, for "
            f"{' and '.join(stacks)}. Name another place for the relocked base (--relocked-base DIR)."
        )
    return found


def _absolute(place: Place) -> Place:
    return place if isinstance(place, str) else place.absolute()


def base_of_adapter(adapter: Adapter, receipt: AdapterReceipt | None, given: Any) -> Place | None:
    """The base of an adapter: the one that was given, else the one that its receipt or its config names, if it is here.

    A stranger's files name a place on this machine at most: no other is asked for what they say.
    """
    if given is not None:
        return as_place(given)
    names = [None if receipt is None else receipt.base.name, adapter.base]
    return next((path for name in names if name and (path := _named(name)) is not None), None)


def _named(name: str) -> Path | None:
    """The checkpoint of this machine that a file names, None where there is none."""
    try:
        return Path(name) if "://" not in name and (Path(name) / CONFIG).is_file() else None
    except (OSError, ValueError):
        return None


def check_quantisation(adapter: Adapter, base: OpenedBase) -> None:
    """Refuse a base that is quantised otherwise than the one that an adapter names, where that can be looked at.

    Raises:
        MismatchError: it is.
    """
    named = _named(adapter.base) if adapter.base else None
    if named is None:
        return
    raw = parse_object(read_bounded(named / CONFIG, MAX_JSON_BYTES), str(named / CONFIG))
    of_named, of_base = _method_of(raw.get("quantization_config")), _method_of(base.part.checkpoint.quantisation)
    if of_named != of_base:
        raise MismatchError(
            f"{adapter.where}: names the base {shown(str(named))}, which is quantised otherwise ({of_named}) than "
            f"{base.place} ({of_base}). Give that base; or, if it is served over this one, say so in its "
            "base_model_name_or_path."
        )


def check_shapes(adapter: Adapter, base: OpenedBase) -> None:
    """Refuse a LoRA any of whose modules is for a weight of another shape, locked or not.

    Raises:
        MismatchError: one is.
    """
    for plain, path in adapter.paths.items():
        parameters, shape = adapter.modules[path], base.part.modules.get(plain)
        a, b = parameters.get("lora_A.weight"), parameters.get("lora_B.weight")
        if shape is None or a is None or b is None or base.part.checkpoint.quantisation:
            continue
        found = (*b.shape[:1], *a.shape[-1:])
        if found not in (shape, shape[::-1]):
            raise MismatchError(
                f"{adapter.where}: {shown(path)[:200]} is for a weight of {list(found)}, and {base.place} has one of "
                f"{list(shape)}. Give the base that the adapter was trained on."
            )


def _method_of(quantisation: Any) -> str:
    """How a `quantization_config` quantises, for comparison."""
    if not isinstance(quantisation, dict) or not quantisation:
        return "not at all"
    method, bits = (str(quantisation.get(key, ""))[:40] for key in ("quant_method", "bits"))
    return shown(f"{method} {bits}".strip())
