"""The new biases and columns of a checkpoint's locked sites, and the digest of what was read for them.

One thread reads a site and folds it: what it has just read is still in the cache. The digest takes longer than that,
and the files can be written meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from fastlock.basis import Likeness
from fastlock.checkpoints.base import Base
from fastlock.checkpoints.checkpoint import Checkpoint, StoredColumns, StoredSite
from fastlock.checkpoints.quantised import DequantisedColumns
from fastlock.errors import UnsupportedError, shown
from fastlock.fold import Fold, fold, rounded_fold
from fastlock.gate_fold import GateFold, gate_fold
from fastlock.locks.gate import Gate
from fastlock.locks.lock import Displacement, Lock
from fastlock.locks.receipt import biases_digest, columns_digest, raw_bytes, weights_digest
from fastlock.storage.byte_columns import Bytes
from fastlock.threads import MAX_THREADS, started_threads, threads_for

T = TypeVar("T")
# Columns are kept until their digest is taken: about so many bytes of them at a time.
_BATCH_BYTES = 32 * 2**20
# New columns are kept until they are written: so many bytes of them, and the others are computed once more.
_KEPT_BYTES = 512 * 2**20
_BY_ADAPTER = (
    "Have the gate as an adapter that is served over it: fastlock.relock_as_adapter, or `fastlock relock --as adapter`."
)


@dataclass(frozen=True)
class KnownFold:
    """A fold that was made before: the new bias, and the SHA-256 of the columns read for it, both as bytes."""

    bias: bytes
    columns_digest: bytes


# By what decides them: the projection's place in its file, the bias that is there already, the lock, the strength.
# Those of a gate are not among them: its new columns are too many bytes to keep.
Folds = dict[tuple[Any, ...], KnownFold]


@dataclass(frozen=True)
class NewColumns:
    """What a gate makes of one site's locked columns.

    Attributes:
        columns: gives them, [hidden, len(heads) * head_dim], in the dtype of the site.
        digest: SHA-256 of their bytes, row by row.
    """

    columns: Callable[[], torch.Tensor]
    digest: bytes


@dataclass(frozen=True)
class FoldedSite:
    """One site's new bias and columns, and what was there before.

    Attributes:
        key: what decides the fold.
        bias: the new one, [hidden], in the dtype of the site; None where the lock has no constant part.
        original: the bias that was there, None where there was none.
        digest: SHA-256 of the columns read, once it is taken.
        likeness: how alike the columns and the base's are; None where that is not known, or the fold was made before.
        rewritten: the new columns; None where the lock has no gate.
    """

    site: StoredSite
    heads: tuple[int, ...]
    key: tuple[Any, ...]
    bias: torch.Tensor | None
    original: torch.Tensor | None
    digest: Future[bytes]
    likeness: Likeness | None
    rewritten: NewColumns | None = None


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

    @cached_property
    def written(self) -> str | None:
        """As `Receipt.written_digest`."""
        digests = [f.rewritten.digest for f in self.sites if f.rewritten is not None]
        return weights_digest(digests) if digests else None

    def known(self) -> Folds:
        """The folds, for other checkpoints that share files with this one."""
        return {
            f.key: KnownFold(raw_bytes(f.bias), f.digest.result())
            for f in self.sites
            if f.bias is not None and f.rewritten is None
        }


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
        UnsupportedError: the lock has a gate, and weights are quantised.
        DamagedError: a fold is not finite, as weights or bias hold NaN or infinities; or the checkpoint is damaged.
        FastlockError: a fold is not finite, as the strength is too large for the dtype; or a file cannot be read.
    """
    gates = lock.gates(strength)
    if gates:
        check_rewritable(checkpoint, sites)
    folding = _Folding(
        checkpoint,
        lock.constant(strength),
        gates,
        lock.has_constant,
        (lock.digest, strength),
        folds,
        threads,
        base,
        _KEPT_BYTES // max(1, len(sites)),
    )
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
    """What `fold_sites` was given: what the lock does in each layer, and what else decides a fold beside the files.

    Attributes:
        kept_bytes: how many bytes of new columns are kept of each site; of a site that has more, none.
    """

    checkpoint: Checkpoint
    displacements: dict[int, Displacement]
    gates: dict[int, Gate]
    has_constant: bool
    of_lock: tuple[str, float]
    folds: Folds
    threads: ThreadPoolExecutor | None
    base: Base
    kept_bytes: int

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
            earlier, digest = torch.frombuffer(bytearray(known.bias), dtype=site.dtype), Future[bytes]()
            digest.set_result(known.columns_digest)
            return FoldedSite(site, heads, key, earlier, original, digest, None)
        read = self.checkpoint.read_columns(site, heads, room)
        bias = self._new_bias(site, read, original) if self.has_constant else None
        rewritten = self._rewritten(site, heads, read) if self.gates else None
        likeness = self.base.likeness(site.layer, heads, read.stored)
        return FoldedSite(site, heads, key, bias, original, self.begin(read.digest), likeness, rewritten)

    def _new_bias(self, site: StoredSite, read: StoredColumns, original: torch.Tensor | None) -> torch.Tensor:
        values, name = self.displacements[site.layer].values, f"{self.checkpoint.where}: {shown(site.name)}"
        if isinstance(read.stored, DequantisedColumns):
            exact = read.stored.exact_fold(values)
            exact = exact if original is None else exact + original.double()
            if exact.isfinite().all():
                return rounded_fold(exact, site.dtype, name)
        columns = read.columns  # of quantised ones, only to say what is not finite in them
        c = None if original is None else original.to(columns.matrix.dtype)
        (bias,) = fold([Fold(columns, values, c, name)])
        return rounded_fold(bias, site.dtype, name)

    def _rewritten(self, site: StoredSite, heads: tuple[int, ...], read: StoredColumns) -> NewColumns:
        def computed(read: StoredColumns) -> torch.Tensor:
            gate, name = self.gates[site.layer], f"{self.checkpoint.where}: {shown(site.name)}"
            (new,) = gate_fold([GateFold(read.columns, gate.readers, gate.writers, name)])
            return new

        def again() -> torch.Tensor:
            return computed(self.checkpoint.read_columns(site, heads))

        new = computed(read)
        digest = columns_digest(new)
        return NewColumns((lambda: new) if new.nbytes <= self.kept_bytes else again, digest)


def check_rewritable(checkpoint: Checkpoint, sites: Sequence[StoredSite]) -> None:
    """Refuse sites whose weights a gate cannot be written into.

    Raises:
        UnsupportedError: one is quantised.
    """
    if (quantised := next((site for site in sites if site.quantised), None)) is not None:
        raise UnsupportedError(
            f"{checkpoint.where}: {shown(quantised.name)} is quantised, and the lock has a gate, which goes into the "
            f"weights: quantised ones cannot be rewritten exactly. {_BY_ADAPTER} Nothing was written."
        )


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
