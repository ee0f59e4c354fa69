"""The new biases of a checkpoint's locked sites, and the digest of what was read for them.

One thread does all of a site, from memory that it uses for the next one: what it has just read is still in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from fastlock.basis import Likeness
from fastlock.checkpoints.base import Base
from fastlock.checkpoints.checkpoint import Bytes, Checkpoint, StoredColumns, StoredSite
from fastlock.errors import FastlockError, shown
from fastlock.fold import Fold, fold
from fastlock.kernels.fold.reference import rounded
from fastlock.locks.lock import Displacement, Lock
from fastlock.locks.receipt import biases_digest, raw_bytes, weights_digest
from fastlock.threads import in_threads, threads_for


@dataclass(frozen=True)
class KnownFold:
    """A fold that was made before: the new bias, and the SHA-256 of the columns read for it, both as bytes."""

    bias: bytes
    columns_digest: bytes


# By what decides them: the projection's place in its file, the bias that is there already, the lock, the strength.
Folds = dict[tuple[Any, ...], KnownFold]


@dataclass(frozen=True)
class FoldedSite:
    """One site's new bias, and what was there before.

    Attributes:
        key: what decides the fold.
        bias, original: [hidden], in the dtype of the site; the original is None where there was none.
        digest: SHA-256 of the columns read.
        likeness: how alike the columns and the base's are; None where that is not known, or the fold was made before.
    """

    site: StoredSite
    heads: tuple[int, ...]
    key: tuple[Any, ...]
    bias: torch.Tensor
    original: torch.Tensor | None
    digest: bytes
    likeness: Likeness | None


@dataclass(frozen=True)
class FoldedSites:
    """The sites of a checkpoint, folded, by layer: a receipt's `Digests`."""

    sites: list[FoldedSite]

    @cached_property
    def weights(self) -> str:
        """As `Receipt.weights_digest`."""
        return weights_digest(f.digest for f in self.sites)

    @cached_property
    def biases(self) -> str:
        """As `Receipt.biases_digest`."""
        return biases_digest(f.bias for f in self.sites)

    def known(self) -> Folds:
        """The folds, for other checkpoints that share files with this one."""
        return {f.key: KnownFold(raw_bytes(f.bias), f.digest) for f in self.sites}


def fold_sites(
    checkpoint: Checkpoint,
    sites: list[StoredSite],
    lock: Lock,
    strength: float,
    folds: Folds,
    base: Base,
) -> FoldedSites:
    """Fold a lock through these sites, in as many threads as torch has in this one.

    Args:
        checkpoint: whose they are.
        sites: those that the lock shifts, by layer.
        lock, strength: the displacement.
        folds: those that were made before.
        base: what is known of the lock's base.

    Raises:
        DamagedError: a fold is not finite, as weights or bias hold NaN or infinities; or the checkpoint is damaged.
        FastlockError: a fold is not finite, as the strength is too large for the dtype; or a file cannot be read.
    """
    displacements = lock.displacement(strength)
    sizes = {site.layer: site.column_bytes(len(displacements[site.layer].heads)) for site in sites}
    threads, rooms = threads_for(len(sites)), SimpleQueue[Bytes]()
    for _ in range(threads):
        rooms.put(np.empty(max(sizes.values()), np.uint8))
    folding = _Folding(checkpoint, displacements, (lock.digest, strength), folds, base, sizes, rooms)
    longest_first = sorted(sites, key=lambda site: -sizes[site.layer])
    folded = in_threads(folding.fold, longest_first, threads)
    return FoldedSites(sorted(folded, key=lambda f: f.site.layer))


@dataclass(frozen=True)
class _Folding:
    """What `fold_sites` was given: the displacement of each layer, and what else decides a fold beside the files.

    Attributes:
        sizes: how many bytes the columns of each layer take.
        rooms: memory for the columns of one site, as much as each thread needs at a time.
    """

    checkpoint: Checkpoint
    displacements: dict[int, Displacement]
    of_lock: tuple[str, float]
    folds: Folds
    base: Base
    sizes: dict[int, int]
    rooms: SimpleQueue[Bytes]

    def fold(self, site: StoredSite) -> FoldedSite:
        """Read and fold one site; or look the fold up, where it was made before."""
        original = None if site.bias is None else self.checkpoint.read_vector(site.bias)
        before = None if original is None else raw_bytes(original)
        key = (*self.checkpoint.identity_of(site), before, *self.of_lock)
        heads = self.displacements[site.layer].heads
        if key in self.folds:
            known = self.folds[key]
            bias = torch.frombuffer(bytearray(known.bias), dtype=site.dtype)
            return FoldedSite(site, heads, key, bias, original, known.columns_digest, None)
        room = self.rooms.get()
        try:
            read = self.checkpoint.read_columns(site, heads, room[: self.sizes[site.layer]])
            return FoldedSite(
                site,
                heads,
                key,
                bias=self._new_bias(site, read, original),
                original=original,
                digest=read.digest(),
                likeness=self.base.likeness(site, heads, read.columns),
            )
        finally:
            self.rooms.put(room)

    def _new_bias(self, site: StoredSite, read: StoredColumns, original: torch.Tensor | None) -> torch.Tensor:
        columns, where = read.columns, self.checkpoint.where
        c = None if original is None else original.to(columns.matrix.dtype)
        (bias,) = fold([Fold(columns, self.displacements[site.layer].values, c, f"{where}: {shown(site.name)}")])
        return _as_stored(bias, site, where)


def _as_stored(bias: torch.Tensor, site: StoredSite, where: str) -> torch.Tensor:
    """A fold in the dtype of the site: that of a quantised projection comes in float64, and is rounded once, here."""
    if bias.dtype == site.dtype:
        return bias
    result = rounded(bias, site.dtype)
    if not result.isfinite().all():
        raise FastlockError(
            f"{where}: {shown(site.name)}: its fold is not finite in {site.dtype}: the strength is too large for this "
            "dtype. Lower it."
        )
    return result
