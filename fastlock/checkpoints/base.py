"""The aligned base that a lock was found in, as far as relocking on disk looks at it: at its locked columns."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastlock.basis import Likeness, column_norms, likeness
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.relocked import original_files
from fastlock.errors import FastlockWarning, MismatchError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock
from fastlock.storage.places import as_place, files_in

# What quantisers leave beside the weights.
_OF_QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml")


@dataclass(frozen=True)
class Base:
    """What is known of the lock's base: its own columns, or their norms, or nothing.

    Attributes:
        norms: of the columns of each locked layer's heads, [heads, head_dim]; empty where the lock carries none.
        checkpoint: the base itself; None if it was not given.
    """

    norms: Mapping[int, torch.Tensor]
    checkpoint: Checkpoint | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything can be compared."""
        return bool(self.norms) or self.checkpoint is not None

    def likeness(self, site: StoredSite, heads: Sequence[int], columns: HeadColumns) -> Likeness | None:
        """How alike the locked columns of a site and the base's are; None where nothing can be compared."""
        if self.checkpoint is None:
            norms = self.norms.get(site.layer)
            return None if norms is None else likeness(columns, norms)
        of_base = self.checkpoint.read_columns(self.checkpoint.sites[site.layer], heads).columns
        return likeness(columns, column_norms(of_base, site.head_dim), of_base)


def base_of(lock: Lock, given: str | os.PathLike[str] | None, checkpoint: Checkpoint) -> Base:
    """What is known of the base of a lock.

    Args:
        lock: the lock.
        given: the base's directory or URL, if there is one.
        checkpoint: what is being relocked.

    Raises:
        MismatchError: the base is not of the geometry of the checkpoint.
        FastlockError, and its kinds: the base cannot be read.
    """
    if given is None:
        return Base(lock.norms_by_layer())
    place = as_place(given)
    base = Checkpoint(original_files(files_in(place), str(place)), str(place))
    base.sites_for(lock)
    own, theirs = (
        (one.sites[0].hidden_size, one.sites[0].num_heads, one.sites[0].head_dim, len(one.sites))
        for one in (checkpoint, base)
    )
    if own != theirs:
        raise MismatchError(
            f"{base.where}: was given as the base of {checkpoint.where}, and has another shape (hidden size, heads, "
            f"head_dim, layers: {theirs}, not {own}). Give the aligned base that the lock was found in."
        )
    return Base({}, base)


def warn_unless_known(base: Base, checkpoint: Checkpoint) -> None:
    """Say that the basis was not checked, where a quantiser may have changed it."""
    quantised = checkpoint.quantisation or any(site.quantised for site in checkpoint.sites)
    if base.is_known or not (quantised or any(name in checkpoint.files for name in _OF_QUANTISERS)):
        return
    warnings.warn(
        f"{checkpoint.where}: basis not checked: the lock carries no column norms and no base was given. Quantisers "
        "may rotate or scale heads, which a lock does not survive: give the base (base=, --base) to compare with.",
        FastlockWarning,
        stacklevel=3,
    )
