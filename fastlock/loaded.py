"""A relocked model that came back from disk: what its config says of the lock, and taking it over.

A relocked checkpoint holds its receipt in config.json, under "fastlock". Taking a loaded model over brings it to
the state that `relock` leaves a model in, so that relocking, unlocking and saving need to know one state only.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from fastlock.carrier import (
    CONFIG_KEY,
    ORIGINAL_BIAS,
    ORIGINALS_FILE,
    RECORD,
    locked_sites,
    relocked_class,
    unlocked_class,
)
from fastlock.errors import FastlockError
from fastlock.files import read_bounded
from fastlock.receipt import Receipt, biases_digest
from fastlock.sites import text_config

MAX_ORIGINALS_BYTES = 1024 * 1024 * 1024


def is_loaded(model: nn.Module) -> bool:
    """Whether the model came back from disk relocked, and has not been taken over yet."""
    return RECORD not in model.__dict__ and CONFIG_KEY in model.config.__dict__


def receipt_of(model: nn.Module) -> Receipt | None:
    """The receipt of a relocked model, whether relocked in this process or before it was saved; else None."""
    if not is_loaded(model):
        record: Receipt | None = model.__dict__.get(RECORD)
        return record
    return Receipt.from_dict(getattr(model.config, CONFIG_KEY), _where(model))


def original_biases(model: nn.Module, receipt: Receipt) -> dict[str, torch.Tensor | None]:
    """The bias that each locked site had before, None where it had none; the model is not changed.

    Raises:
        FastlockError: a loaded checkpoint has lost the file that keeps them.
    """
    sites = locked_sites(model, receipt)
    if RECORD in model.__dict__:
        return {site.name: getattr(site.module, ORIGINAL_BIAS, None) for site in sites}
    kept = _kept_originals(model) if any(site.had_bias for site in receipt.sites) else {}
    originals: dict[str, torch.Tensor | None] = {}
    for locked, site in zip(receipt.sites, sites, strict=True):
        original = kept.get(site.name) if locked.had_bias else None
        if locked.had_bias and (original is None or site.bias is None or original.shape != site.bias.shape):
            raise FastlockError(
                f"{_where(model)}: {ORIGINALS_FILE} does not hold the original bias of {site.name}, so it can't be "
                "put back. Get the whole directory again, or start from the original checkpoint."
            )
        originals[site.name] = None if original is None else original.to(site.weight)
    return originals


def take_over(model: nn.Module, undo: ExitStack) -> None:
    """Bring a loaded relocked model to the state that `relock` leaves; nothing to do for any other.

    Raises:
        FastlockError: the checkpoint is damaged, or its biases were changed after fastlock wrote them.
    """
    if not is_loaded(model):
        return
    receipt = Receipt.from_dict(getattr(model.config, CONFIG_KEY), _where(model))
    if not unchanged(model, receipt):
        raise FastlockError(
            f"{_where(model)}: the locked biases are not those that fastlock wrote (trained since, or loaded in part); "
            "replacing them would lose that change. Start from the original checkpoint."
        )
    originals = original_biases(model, receipt)
    if not _drop_added_biases(model, receipt, undo):
        originals = {name: torch.zeros_like(_bias(model, name)) if o is None else o for name, o in originals.items()}
    for name, original in originals.items():
        if original is not None:
            module: Any = model.get_submodule(name)
            module.register_buffer(ORIGINAL_BIAS, original, persistent=False)
            undo.callback(delattr, module, ORIGINAL_BIAS)
    sites = tuple(replace(site, had_bias=originals[site.name] is not None) for site in receipt.sites)
    data = getattr(model.config, CONFIG_KEY)
    delattr(model.config, CONFIG_KEY)
    undo.callback(setattr, model.config, CONFIG_KEY, data)
    mark(model, replace(receipt, sites=sites), undo)


def mark(model: nn.Module, receipt: Receipt | None, undo: ExitStack) -> None:
    """Note on the model that it is relocked (or, with None, that it is not)."""
    undo.callback(setattr, model, "__class__", model.__class__)
    if RECORD in model.__dict__:
        undo.callback(setattr, model, RECORD, model.__dict__[RECORD])
        delattr(model, RECORD)
    else:
        undo.callback(model.__dict__.pop, RECORD, None)
    model.__class__ = relocked_class(unlocked_class(type(model))) if receipt else unlocked_class(type(model))
    if receipt:
        setattr(model, RECORD, receipt)


def _drop_added_biases(model: nn.Module, receipt: Receipt, undo: ExitStack) -> bool:
    """Take away the zero biases that the carrier added beside the locked ones; False where they must stay.

    They stay where the config's flag was on before (a Qwen2 in Llama form), and where training has filled them.
    """
    carrier = _carrier(model)
    flag, was = carrier["flag"], carrier["was"]
    if was or not flag:
        return bool(not flag)
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
            module.bias = None
    undo.callback(setattr, text_config(model), flag, True)
    setattr(text_config(model), flag, False)
    return True


def unchanged(model: nn.Module, receipt: Receipt) -> bool:
    """Whether the locked biases are those that fastlock wrote, as far as the dtype they were loaded in can tell."""
    written = getattr(torch, receipt.dtype, None)
    biases = [site.bias for site in locked_sites(model, receipt)]
    if not isinstance(written, torch.dtype) or any(bias is None for bias in biases):
        return False
    if any(bias is not None and torch.promote_types(bias.dtype, written) != bias.dtype for bias in biases):
        return True
    return biases_digest(bias if bias is None else bias.to(written) for bias in biases) == receipt.biases_digest


def _kept_originals(model: nn.Module) -> dict[str, torch.Tensor]:
    from transformers.utils import cached_file

    try:
        path = cached_file(_path(model), ORIGINALS_FILE)
        return safetensors.torch.load(read_bounded(Path(path), MAX_ORIGINALS_BYTES))
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise FastlockError(
            f"{_where(model)}: {ORIGINALS_FILE}, which keeps the original biases, can't be read ({error}). "
            "Get the whole directory again, or start from the original checkpoint."
        ) from None


def _carrier(model: nn.Module) -> dict[str, Any]:
    carrier = getattr(model.config, CONFIG_KEY).get("carrier")
    if not isinstance(carrier, dict) or not {"form", "flag", "was"} <= carrier.keys():
        raise FastlockError(f"{_where(model)}: the receipt is damaged (no carrier). Get the checkpoint again.")
    return carrier


def _bias(model: nn.Module, site_name: str) -> torch.Tensor:
    return model.get_parameter(f"{site_name}.bias")


def _where(model: nn.Module) -> str:
    return f"{_path(model) or type(model).__name__}/config.json"


def _path(model: nn.Module) -> str:
    config: Any = model.config
    return str(getattr(config, "_name_or_path", "") or "")
