"""The aligned base that a lock was found in, as far as relocking on disk looks at it: at its locked columns."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastlock.basis import Columns, Likeness, column_norms, likeness
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.relocked import original_files
from fastlock.errors import FastlockWarning, MismatchError
from fastlock.locks.lock import Lock
from fastlock.storage.places import as_place, files_in

Shape = tuple[int, int, int, int]  # hidden size, heads, head_dim, layers

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

    def likeness(self, layer: int, heads: Sequence[int], columns: Columns) -> Likeness | None:
        """How alike the locked columns of a layer and the base's are; None where nothing can be compared."""
        if self.checkpoint is None:
            norms = self.norms.get(layer)
            return None if norms is None else likeness(columns, norms)
        site = self.checkpoint.sites[layer]
        of_base = self.checkpoint.read_columns(site, heads).columns
        return likeness(columns, column_norms(of_base, site.head_dim), of_base)


def base_of(lock: Lock, given: str | os.PathLike[str] | None, shape: Shape, where: str) -> Base:
    """What is known of the base of a lock.

    Args:
        lock: the lock.
        given: the base's directory or URL, if there is one.
        shape: of what is being relocked.
        where: what that is, for messages.

    Raises:
        MismatchError: the base is of another shape.
        FastlockError, and its kinds: the base cannot be read.
    """
    if given is None:
        return Base(lock.norms_by_layer())
    place = as_place(given)
    base = Checkpoint(original_files(files_in(place), str(place)), str(place))
    base.sites_for(lock)
    if (theirs := shape_of(base)) != shape:
        raise MismatchError(
            f"{base.where}: was given as the base of {where}, and has another shape (hidden size, heads, head_dim, "
            f"layers: {theirs}, not {shape}). Give the aligned base that the lock was found in."
        )
    return Base({}, base)


def shape_of(checkpoint: Checkpoint) -> Shape:
    """The shape of a checkpoint."""
    site = checkpoint.sites[0]
    return site.hidden_size, site.num_heads, site.head_dim, len(checkpoint.sites)


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
