"""Checking a lock: recompute every fold from the model's own weights, and compare."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastlock.checkpoint import load_model
from fastlock.loaded import is_loaded, original_biases, receipt_of, unchanged
from fastlock.lock import Displacement, Lock, check_lock
from fastlock.receipt import Receipt
from fastlock.reference import error_bound, exact_fold
from fastlock.sites import Site, sites_for, unwrapped


@dataclass(frozen=True)
class Verification:
    """What was found; true exactly when the lock is in place, whole and unaltered.

    Attributes:
        state: "locked", "not locked" or "altered".
        strength: the strength found, None where there is none.
        layers: the layers that the lock shifts.
        altered: those of them whose bias is not what their own weights give.
        reason: one sentence for people.
    """

    state: str
    strength: float | None
    layers: tuple[int, ...]
    altered: tuple[int, ...]
    reason: str

    def __bool__(self) -> bool:
        return self.state == "locked"

    def to_dict(self) -> dict[str, Any]:
        """The findings as data that JSON can hold."""
        return asdict(self)


def verify(model_or_directory: nn.Module | str | os.PathLike[str], lock: Lock) -> Verification:
    """Whether this lock is in place: every fold recomputed in float64 from the model's own weights, and compared.

    A bias counts as right within one unit in the last place of its dtype and the rounding of a float32 sum
    (`reference.error_bound`). A directory is loaded as `AutoModelForCausalLM` loads it, so that the answer is about
    what really runs. A model without a receipt is recognised too, where its family has no biases of its own.

    Raises:
        FastlockError: the lock does not fit the model, or the directory can't be loaded.
    """
    check_lock(lock)
    given = model_or_directory
    model = unwrapped(given if isinstance(given, nn.Module) else load_model(given, exact=False))
    sites = sites_for(model, lock)
    receipt = receipt_of(model)
    if receipt is None:
        return _without_receipt(sites, lock)
    layers = tuple(site.layer for site in sites)
    if receipt.lock_digest != lock.digest:
        other = f"it is relocked with another lock (sha256 {receipt.lock_digest[:12]}…, not {lock.digest[:12]}…)"
        return Verification("not locked", None, layers, (), other)
    return _with_receipt(model, receipt, sites, lock)


def _with_receipt(model: nn.Module, receipt: Receipt, sites: list[Site], lock: Lock) -> Verification:
    layers = tuple(site.layer for site in sites)
    if receipt.strength == 0:
        return Verification("not locked", 0.0, layers, (), "it is relocked at strength 0, which changes nothing")
    originals = original_biases(model, receipt)
    displacements = lock.displacement(receipt.strength)
    altered = tuple(
        site.layer for site in sites if not _is_fold(site, displacements[site.layer], originals.get(site.name))
    )
    if not altered and is_loaded(model) and not unchanged(model, receipt):
        return Verification("altered", receipt.strength, layers, layers, "the biases do not match the receipt's digest")
    if altered:
        reason = f"{len(altered)} of {len(layers)} layers hold a bias that their own weights do not give"
        return Verification("altered", receipt.strength, layers, altered, reason)
    return Verification("locked", receipt.strength, layers, (), f"all {len(layers)} layers hold their fold")


def _is_fold(site: Site, displacement: Displacement, original: torch.Tensor | None) -> bool:
    if site.bias is None:
        return False
    expected = exact_fold(site.weight, displacement, original)
    error = (site.bias.detach().to(expected.device).double() - expected).abs()
    return bool((error <= error_bound(site.weight, displacement, original)).all())


def _without_receipt(sites: list[Site], lock: Lock) -> Verification:
    """Recognise a lock by its biases alone: b = s·W d with one s for all layers, by least squares."""
    layers = tuple(site.layer for site in sites)
    if all(site.bias is None or not site.bias.count_nonzero() for site in sites):
        return Verification("not locked", None, layers, (), "there is no receipt, and no bias at the locked layers")
    unit = lock.displacement(1.0)
    folds = torch.cat([exact_fold(site.weight, unit[site.layer]).cpu() for site in sites])
    biases = torch.cat(
        [
            torch.zeros(len(s.weight), dtype=torch.float64, device="cpu")
            if s.bias is None
            else s.bias.detach().cpu().double()
            for s in sites
        ]
    )
    estimate = float(folds @ biases / (folds @ folds))
    for strength in (round(estimate, 3), estimate):
        if 0 < strength < math.inf:
            displacements = lock.displacement(strength)
            if all(_is_fold(site, displacements[site.layer], None) for site in sites):
                return Verification("locked", strength, layers, (), "there is no receipt, but every bias is the fold")
    reason = "there is no receipt, and the biases are not folds of this lock alone"
    return Verification("not locked", None, layers, (), reason)
