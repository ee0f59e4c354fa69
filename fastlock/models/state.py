"""What a relocked model carries: its receipt, the biases that were there before, and those that the lock put there.

`columns` has the same of weights that a gate was written into.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastlock.errors import DamagedError, FastlockError, shown
from fastlock.locks.receipt import KnownDigests, Receipt, biases_digest, columns_digest, weights_digest
from fastlock.models.columns import holds_gate, original_columns, placed_columns
from fastlock.models.sites import Site, family_of
from fastlock.models.sites import sites as every_site

# The attribute of a relocked model that holds its receipt.
RECEIPT = "_fastlock"

# Buffers beside a locked projection, which move with it: the bias that was there before, and what the lock put there.
ORIGINAL_BIAS = "fastlock_original_bias"
PLACED_BIAS = "fastlock_placed_bias"


def locked_sites(model: nn.Module, receipt: Receipt) -> list[Site]:
    """The sites that a receipt names.

    Raises:
        DamagedError: the model does not have them.
    """
    by_layer = {site.layer: site for site in every_site(model)}
    tail = f"{family_of(model).layers}.{{}}.{family_of(model).projection}"  # above that, a file may have other names
    missing = [
        site for site in receipt.sites if site.layer not in by_layer or not site.name.endswith(tail.format(site.layer))
    ]
    if missing:
        raise DamagedError(
            f"the receipt names {shown(missing[0].name)}, which {type(model).__name__} does not have. "
            "The receipt belongs to another model: relock the original checkpoint."
        )
    return [by_layer[site.layer] for site in receipt.sites]


def holds_lock(module: Any) -> bool:
    """Whether a lock was put into a projection: into its bias, its weight or both."""
    return hasattr(module, PLACED_BIAS) or holds_gate(module)


def keep(module: nn.Module, original: torch.Tensor | None, placed: torch.Tensor, undo: ExitStack) -> None:
    """Keep what was there before, and a copy of what the lock put there, in buffers that move with the module."""
    undo.callback(forget, module)
    if original is not None:
        module.register_buffer(ORIGINAL_BIAS, original, persistent=False)
    module.register_buffer(PLACED_BIAS, placed, persistent=False)


def forget(module: nn.Module) -> None:
    """Drop what `keep` kept."""
    for name in (ORIGINAL_BIAS, PLACED_BIAS):
        if hasattr(module, name):
            delattr(module, name)


def remove_bias(module: Any) -> None:
    """Leave a module without a bias."""
    if type(module._parameters) is not dict and module.bias is not None:
        del module.bias  # what compressed-tensors keeps parameters in takes no None in the place of a tensor
    module.bias = None


def set_receipt(model: nn.Module, receipt: Receipt | None) -> None:
    """Note on the model what was done, and nothing else; None removes the note."""
    if receipt is None:
        model.__dict__.pop(RECEIPT, None)
    else:
        setattr(model, RECEIPT, receipt)


# What `announce` changed, with the earlier values: those of the config's flag, and of the model's name.
_BEFORE = "_fastlock_before"
_RELOCKED = " (relocked by fastlock)"


def announce(model: Any, receipt: Receipt | None, undo: ExitStack) -> None:
    """Let the model itself say that it is relocked, for what saves it without asking fastlock; or no longer.

    Its config (a copy: others may share the original) asks for the biases that its files will hold, if any, and
    adapters that are trained on it do not name the unlocked model as their base.
    """
    relocked = receipt is not None
    if relocked == (_BEFORE in model.__dict__):
        return
    attributes = ("config", "name_or_path", _BEFORE)
    earlier = {name: model.__dict__[name] for name in attributes if name in model.__dict__}
    undo.callback(_restore_attributes, model, attributes, earlier)
    flag = family_of(model).bias_flag
    model.config = (
        copy.copy(model.config) if model.config.get_text_config() is model.config else copy.deepcopy(model.config)
    )
    text = model.config.get_text_config()
    if receipt is not None:
        model.__dict__[_BEFORE] = (getattr(text, flag) if flag else None, model.__dict__.get("name_or_path"))
        if flag and receipt.constant:
            setattr(text, flag, True)
        if model.__dict__.get("name_or_path"):
            model.__dict__["name_or_path"] += _RELOCKED
    else:
        was_on, name = model.__dict__.pop(_BEFORE)
        if flag:
            setattr(text, flag, was_on)
        if name is not None:
            model.__dict__["name_or_path"] = name


def flag_before(model: Any, flag: str) -> bool:
    """What the config's flag for biases was before the model was relocked."""
    before = model.__dict__.get(_BEFORE)
    return bool(getattr(model.config.get_text_config(), flag) if before is None else before[0])


def _restore_attributes(model: Any, names: Sequence[str], earlier: dict[str, Any]) -> None:
    for name in names:
        model.__dict__.pop(name, None)
    model.__dict__.update(earlier)


class SiteDigests:
    """The digests of sites as they are now, taken when they are asked for; see `locks.receipt.Digests`.

    It keeps no model alive, and notices changed weights. A copy of it holds the digests that are known by then.
    """

    def __init__(self, receipt: Receipt, sites: Sequence[Site]) -> None:
        self._locked, self._rank, self._constant = receipt.sites, receipt.rank, receipt.constant
        self._sites = [(_references(site), site.layer, site.name, site.num_heads, site.head_dim) for site in sites]
        self._versions = _versions(sites)

    @cached_property
    def weights(self) -> str:
        """As `Receipt.weights_digest`."""
        return weights_digest(
            columns_digest(_side_by_side(site, locked.heads))
            for locked, site in zip(self._locked, self._unchanged(), strict=True)
        )

    @cached_property
    def biases(self) -> str:
        """As `Receipt.biases_digest`."""
        return biases_digest(site.bias for site in self._unchanged() if self._constant)

    @cached_property
    def written(self) -> str | None:
        """As `Receipt.written_digest`: of what was written, whatever training or loading made of it since."""
        if not self._rank:
            return None
        return weights_digest(columns_digest(placed_columns(site)) for site in self._unchanged())

    def _unchanged(self) -> list[Site]:
        sites = []
        for references, layer, name, num_heads, head_dim in self._sites:
            module, adapter = (reference and reference() for reference in references)
            if module is None:
                raise FastlockError("the model of this receipt is gone. Call to_dict() before you drop the model.")
            sites.append(Site(layer, name, module, num_heads, head_dim, adapter))
        if _versions(sites) != self._versions:
            raise FastlockError(
                "the model was changed since this receipt was made: digests taken now would not be its own. Relock "
                "the model for a receipt of its present state."
            )
        return sites

    def __reduce__(self) -> tuple[Any, ...]:
        if {"weights", "biases", *(["written"] if self._rank else [])} <= self.__dict__.keys():
            return KnownDigests, (self.weights, self.biases, self.written)
        return type(None), ()


def with_digests_of(receipt: Receipt, sites: Sequence[Site]) -> Receipt:
    """The same receipt, with digests of these sites, taken when they are asked for.

    Those of quantised sites are taken now: their modules put other tensors in the place of the weights.
    """
    digests = SiteDigests(receipt, sites)
    if all(site.projection.in_place for site in sites):
        return replace(receipt, digests=digests)
    return replace(receipt, digests=KnownDigests(digests.weights, digests.biases))


def _side_by_side(site: Site, heads: Sequence[int]) -> torch.Tensor:
    """The columns of W that a lock reads, [hidden, len(heads) * head_dim]: as they were before its gate."""
    columns = original_columns(site, heads)
    return torch.cat([columns.matrix[:, start : start + site.head_dim] for start in columns.starts], dim=1)


def _references(site: Site) -> list[Any]:
    """Weak references to a site's module, and to the adapter around it; None where there is none."""
    return [module and weakref.ref(module) for module in (site.module, site.adapter)]


def _versions(sites: Iterable[Site]) -> list[tuple[int, int]]:
    tensors = [tensor for site in sites for tensor in (getattr(site.module, "weight", None), site.module.bias)]
    return [(id(tensor), version_of(tensor)) for tensor in tensors]


def version_of(tensor: torch.Tensor | None) -> int:
    """How often a tensor was written to, as far as PyTorch counts that: 0 where it does not."""
    try:
        return 0 if tensor is None else tensor._version
    except RuntimeError:  # made in inference mode
        return 0
