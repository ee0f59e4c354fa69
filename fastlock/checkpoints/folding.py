"""The new biases of a checkpoint's locked sites, and the digest of what was read for them.

One thread reads a site and folds it: what it has just read is still in the cache. The digest takes longer than that,
and the files can be written meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from fastlock.basis import Likeness
from fastlock.checkpoints.base import Base
from fastlock.checkpoints.checkpoint import Bytes, Checkpoint, StoredColumns, StoredSite
from fastlock.errors import shown
from fastlock.fold import Fold, fold, rounded_fold
from fastlock.locks.lock import Displacement, Lock
from fastlock.locks.receipt import biases_digest, raw_bytes, weights_digest
from fastlock.threads import MAX_THREADS, started_threads, threads_for

T = TypeVar("T")
# Columns are kept until their digest is taken: about so many bytes of them at a time.
_BATCH_BYTES = 32 * 2**20


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
        digest: SHA-256 of the columns read, once it is taken.
        likeness: how alike the columns and the base's are; None where that is not known, or the fold was made before.
    """

    site: StoredSite
    heads: tuple[int, ...]
    key: tuple[Any, ...]
    bias: torch.Tensor
    original: torch.Tensor | None
    digest: Future[bytes]
    likeness: Likeness | None


@dataclass(frozen=True)
class FoldedSites:
    """The sites of a checkpoint, folded, by layer: a receipt's `Digests`, which waits for those of what was read."""

    sites: list[FoldedSite]

    @cached_property
    def weights(self) -> str:
        """As `Receipt.weights_digest`."""
        return weights_digest(f.digest.result() for f in self.sites)

    @cached_property
    def biases(self) -> str:
        """As `Receipt.biases_digest`."""
        return biases_digest(f.bias for f in self.sites)

    @property
    def written(self) -> str | None:
        """As `Receipt.written_digest`: biases alone were written."""
        return None

    def known(self) -> Folds:
        """The folds, for other checkpoints that share files with this one."""
        return {f.key: KnownFold(raw_bytes(f.bias), f.digest.result()) for f in self.sites}


@contextlib.contextmanager
def helpers() -> Iterator[ThreadPoolExecutor | None]:
    """Threads that fold, and take digests, as long as the block lasts; None, if torch has one thread in this one."""
    threads = threads_for(MAX_THREADS)
    if threads == 1:
        yield None
    else:
        with started_threads(threads) as pool:
            yield pool


def fold_sites(
    checkpoint: Checkpoint,
    sites: list[StoredSite],
    lock: Lock,
    strength: float,
    folds: Folds,
    threads: ThreadPoolExecutor | None,
    base: Base,
) -> FoldedSites:
    """Fold a lock through these sites. When it returns, some of their digests may still be on their way.

    Args:
        checkpoint: whose they are.
        sites: those that the lock shifts, by layer.
        lock, strength: the displacement.
        folds: those that were made before.
        threads: the `helpers`.
        base: what is known of the lock's base.

    Raises:
        DamagedError: a fold is not finite, as weights or bias hold NaN or infinities; or the checkpoint is damaged.
        FastlockError: a fold is not finite, as the strength is too large for the dtype; or a file cannot be read.
    """
    folding = _Folding(checkpoint, lock.displacement(strength), (lock.digest, strength), folds, threads, base)
    folded: list[FoldedSite] = []
    for batch in _batches(sites, folding.displacements):
        for earlier in folded:
            earlier.digest.result()  # after which its columns are let go
        # The longest begin, so that no thread ends with one, alone.
        longest_first = sorted(batch, key=lambda site_and_room: -len(site_and_room[1]))
        begun = [folding.begin(folding.fold, site, room) for site, room in longest_first]
        folded += [one.result() for one in begun]
    return FoldedSites(sorted(folded, key=lambda f: f.site.layer))


@dataclass(frozen=True)
class _Folding:
    """What `fold_sites` was given: the displacement of each layer, and what else decides a fold beside the files."""

    checkpoint: Checkpoint
    displacements: dict[int, Displacement]
    of_lock: tuple[str, float]
    folds: Folds
    threads: ThreadPoolExecutor | None
    base: Base

    def begin(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a function in another thread, after what was begun before; at once, where there is no other."""
        if self.threads is not None:
            return self.threads.submit(function, *arguments)
        done: Future[T] = Future()
        done.set_result(function(*arguments))
        return done

    def fold(self, site: StoredSite, room: Bytes) -> FoldedSite:
        """Read one site into this room, fold it, and begin to take its digest; or look up what was done before."""
        original = None if site.bias is None else self.checkpoint.read_vector(site.bias)
        before = None if original is None else raw_bytes(original)
        key = (*self.checkpoint.identity_of(site), before, *self.of_lock)
        heads = self.displacements[site.layer].heads
        if (known := self.folds.get(key)) is not None:
            bias, digest = torch.frombuffer(bytearray(known.bias), dtype=site.dtype), Future[bytes]()
            digest.set_result(known.columns_digest)
            return FoldedSite(site, heads, key, bias, original, digest, None)
        read = self.checkpoint.read_columns(site, heads, room)
        bias = self._new_bias(site, read, original)
        likeness = self.base.likeness(site, heads, read.columns)
        return FoldedSite(site, heads, key, bias, original, self.begin(read.digest), likeness)

    def _new_bias(self, site: StoredSite, read: StoredColumns, original: torch.Tensor | None) -> torch.Tensor:
        columns, name = read.columns, f"{self.checkpoint.where}: {shown(site.name)}"
        c = None if original is None else original.to(columns.matrix.dtype)
        (bias,) = fold([Fold(columns, self.displacements[site.layer].values, c, name)])
        return rounded_fold(bias, site.dtype, name)


def _batches(
    sites: list[StoredSite], displacements: dict[int, Displacement]
) -> Iterator[list[tuple[StoredSite, Bytes]]]:
    """The sites with room for their columns, as many as may be kept; one at a time where nothing is done beside."""
    limit = 0 if torch.get_num_threads() == 1 else _BATCH_BYTES
    batch, sizes = list[StoredSite](), list[int]()
    for site in sites:
        size = site.column_bytes(len(displacements[site.layer].heads))
        if batch and sum(sizes) + size > limit:
            yield list(zip(batch, _rooms(sizes), strict=True))
            batch, sizes = [], []
        batch.append(site)
        sizes.append(size)
    yield list(zip(batch, _rooms(sizes), strict=True))


def _rooms(sizes: list[int]) -> list[Bytes]:
    """Memory in one piece, which the kernel gives in large pages: small ones take longer to get than to fill."""
    return np.split(np.empty(sum(sizes), np.uint8), np.cumsum(sizes)[:-1])
