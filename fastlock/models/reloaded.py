"""A relocked model that came back from disk: what its config says of the lock, and taking it over.

A relocked checkpoint holds its receipt in config.json, under "fastlock". Taking a loaded model over brings it to
the state in which `relock` leaves a model: relocking, unlocking and saving need to know that state only.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastlock.dtypes import BY_TORCH_NAME, holds
from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.locks.receipt import (
    CONFIG_KEY,
    CarrierNote,
    Receipt,
    SavedReceipt,
    biases_digest,
    columns_digest,
    weights_digest,
)
from fastlock.models.columns import present_columns
from fastlock.models.saving import AroundRelocked, PartOfRelocked, Relocked, swapped_class, unlocked_class
from fastlock.models.sites import Site, check_foldable, family_of, is_peft_model, text_config
from fastlock.models.state import ORIGINAL_BIAS, RECEIPT, announce, keep, locked_sites, remove_bias, set_receipt


def is_loaded(model: nn.Module) -> bool:
    """Whether the model came back from disk relocked, and has not been taken over yet."""
    return RECEIPT not in model.__dict__ and CONFIG_KEY in model.config.__dict__


def receipt_of(model: nn.Module) -> Receipt | None:
    """The receipt of a model that was relocked in this process or before it was saved; None for any other.

    Raises:
        UnsupportedError: the receipt in its config is of a newer format.
        DamagedError: it is damaged.
    """
    if not is_loaded(model):
        receipt: Receipt | None = model.__dict__.get(RECEIPT)
        return receipt
    return _saved(model).receipt


def check_unlocked(model: nn.Module, why: str, *, name: str = "", or_else: str = "") -> None:
    """Refuse a model that is relocked.

    Args:
        why: it has to be unlocked, in words that can follow "and".
        name: what the message calls it; by default its class.
        or_else: a further sentence on what to do, with a space in front.

    Raises:
        FastlockError: it is relocked.
    """
    if receipt_of(model) is not None:
        raise FastlockError(
            f"{name or type(model).__name__} is relocked, and {why}. Unlock it first: fastlock.unlock(model), or "
            f"`fastlock unlock` for a checkpoint.{or_else}"
        )


def original_biases(model: nn.Module, receipt: Receipt) -> dict[str, torch.Tensor | None]:
    """The bias that each locked site had before, None where it had none; the model is not changed.

    Raises:
        DamagedError: the receipt of a loaded checkpoint does not hold them.
    """
    sites = locked_sites(model, receipt)
    if RECEIPT in model.__dict__:
        return {site.name: getattr(site.module, ORIGINAL_BIAS, None) for site in sites}
    kept = _carrier(model).original_biases
    return {
        site.name: _decoded(model, kept.get(site.layer), site, dtype) if locked.had_bias else None
        for locked, site, dtype in zip(receipt.sites, sites, receipt.dtypes, strict=True)
    }


def take_over(model: nn.Module, undo: ExitStack) -> None:
    """Bring a loaded relocked model to the state in which `relock` leaves one; do nothing to any other.

    Raises:
        DamagedError: the checkpoint is damaged, or its biases were changed since fastlock wrote them.
        UnsupportedError: its receipt is of a newer format; or it was saved with a gate in its weights.
    """
    if not is_loaded(model):
        return
    receipt = _saved(model).receipt
    if receipt.rank:
        raise UnsupportedError(
            f"{_where(model)}: the gate of a lock is in its weights, and the columns that were there before did not "
            "come with it: it can be neither unlocked nor relocked in memory. Load the original checkpoint, which "
            "`fastlock unlock` gives back if `fastlock relock` wrote this one; and unlock a model before you save it "
            "if it is to be relocked later."
        )
    sites = locked_sites(model, receipt)
    for site in sites:
        check_foldable(site)
    for site in sites:
        if model.get_submodule(site.name) is not site.module:
            raise UnsupportedError(
                f"{site.name}: adapters were put around a projection that was relocked on disk. Unlock the base before "
                "they are put on (fastlock.unlock(base), or load the original checkpoint), then relock."
            )
    receipt = receipt.renamed([site.name for site in sites])  # in the files they may have had other names
    if not unchanged(model, receipt):
        raise DamagedError(
            f"{_where(model)}: the locked biases are not those that fastlock wrote (trained since, or loaded in part). "
            "Replacing them would lose that change. Start from the original checkpoint."
        )
    originals, carrier = original_biases(model, receipt), _carrier(model)
    if not _drop_added_biases(model, receipt, carrier, undo):
        originals = {name: torch.zeros_like(_bias(model, name)) if o is None else o for name, o in originals.items()}
    for name, original in originals.items():
        keep(model.get_submodule(name), original, _bias(model, name).detach().clone(), undo)
    noted = tuple(replace(site, had_bias=originals[site.name] is not None) for site in receipt.sites)
    data = getattr(model.config, CONFIG_KEY)
    delattr(model.config, CONFIG_KEY)
    undo.callback(setattr, model.config, CONFIG_KEY, data)
    mark(model, replace(receipt, sites=noted, original_config=carrier.original_config), undo)


def mark(model: nn.Module, receipt: Receipt | None, undo: ExitStack) -> None:
    """Note on the model that it is relocked (or, with None, that it is not), and let it be saved accordingly."""
    known = receipt or model.__dict__[RECEIPT]
    undo.callback(set_receipt, model, model.__dict__.get(RECEIPT))
    set_receipt(model, receipt)
    announce(model, receipt, undo)
    _swap(model, Relocked if receipt else None, undo)
    path = known.sites[0].name.split(".")
    for length in range(1, len(path)):
        part = model.get_submodule(".".join(path[:length]))
        if hasattr(part, "save_pretrained"):
            _swap(part, PartOfRelocked if receipt else None, undo)


def guard_saving(model: nn.Module, undo: ExitStack) -> None:
    """Let PEFT's model refuse to save its adapters without the lock; do nothing to any other model."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    if is_peft_model(inner):
        _swap(inner, AroundRelocked, undo)


def _swap(module: nn.Module, gained: type | None, undo: ExitStack) -> None:
    undo.callback(setattr, module, "__class__", module.__class__)
    own = unlocked_class(type(module))
    module.__class__ = own if gained is None else swapped_class(gained, own)


def _drop_added_biases(model: nn.Module, receipt: Receipt, carrier: CarrierNote, undo: ExitStack) -> bool:
    """Remove the zero biases that the carrier added beside the locked ones; False where they must stay.

    They stay where the config's flag was on before (a Qwen2 in Llama form), and where training has filled them.
    """
    flag = carrier.flag
    if carrier.was or not flag:
        return not flag
    config: Any = copy.deepcopy(model.config)
    setattr(config.get_text_config(), flag, False)
    with torch.device("meta"):
        places = unlocked_class(type(model))(config).state_dict()
    locked = {f"{site.name}.bias" for site in receipt.sites}
    added = [name for name, _ in model.named_parameters() if name.endswith(".bias") and name not in places]
    if any(model.get_parameter(name).count_nonzero() for name in added if name not in locked):
        return False
    for name in added:
        if name not in locked:
            module: Any = model.get_submodule(name.removesuffix(".bias"))
            undo.callback(setattr, module, "bias", module.bias)
            remove_bias(module)
    undo.callback(setattr, text_config(model), flag, True)
    setattr(text_config(model), flag, False)
    return True


def unchanged(model: nn.Module, receipt: Receipt) -> bool:
    """Whether the locked biases are those that fastlock wrote, and the locked columns if it wrote a gate into them.

    As far as the dtype they were loaded in can tell.
    """
    biases, columns = [], []
    for name, locked, site in zip(receipt.dtypes, receipt.sites, locked_sites(model, receipt), strict=True):
        dtype, bias = BY_TORCH_NAME.get(name), site.bias
        if dtype is None or (bias is None and receipt.constant):
            return False
        if not holds(site.projection.dtype if bias is None else bias.dtype, dtype):  # rounded since: who could tell?
            return True
        if bias is not None and receipt.constant:
            biases.append(bias.to(dtype))
        if receipt.rank:
            columns.append(columns_digest(present_columns(site, locked.heads).to(dtype)))
    if receipt.rank and weights_digest(columns) != receipt.written_digest:
        return False
    return biases_digest(biases) == receipt.biases_digest


def can_tell(model: nn.Module, receipt: Receipt) -> bool:
    """Whether the weights were loaded in a dtype that holds all that was written."""
    dtypes = (BY_TORCH_NAME.get(name) for name in receipt.dtypes)
    return all(
        dtype is not None and holds(site.projection.dtype, dtype)
        for dtype, site in zip(dtypes, locked_sites(model, receipt), strict=True)
    )


def _decoded(model: nn.Module, data: bytes | None, site: Site, dtype: str) -> torch.Tensor:
    try:
        original = torch.frombuffer(bytearray(data or b""), dtype=BY_TORCH_NAME[dtype])
        if site.bias is None or original.shape != site.bias.shape:
            raise ValueError(f"{len(original)} numbers")
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(
            f"{_where(model)}: the receipt does not hold the original bias of {site.name} ({error}), which therefore "
            "cannot be put back. Download the checkpoint again, or start from the original one."
        ) from None
    return original.to(site.bias)


def _saved(model: nn.Module) -> SavedReceipt:
    return SavedReceipt.from_dict(getattr(model.config, CONFIG_KEY), _where(model))


def _carrier(model: nn.Module) -> CarrierNote:
    """How the checkpoint says that it carries the lock, if that can be true of this model."""
    carrier = _saved(model).carrier
    if carrier.form != "weights" and carrier.flag != family_of(model).bias_flag:
        raise DamagedError(f"{_where(model)}: the receipt is damaged (carrier). Download the checkpoint again.")
    return carrier


def _bias(model: nn.Module, site_name: str) -> torch.Tensor:
    return model.get_parameter(f"{site_name}.bias")


def _where(model: nn.Module) -> str:
    config: Any = model.config
    return f"{getattr(config, '_name_or_path', '') or type(model).__name__}/config.json"
