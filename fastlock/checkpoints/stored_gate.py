"""A gate in a checkpoint's weights, checked: folded anew from the columns that were there before, which are kept.

Columns are long, and may come over a network. Each is read once: its digest is taken where it is compared.
"""

from __future__ import annotations

from collections.abc import Callable

from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.layout import COLUMNS_FILE
from fastlock.checkpoints.original_columns import OriginalColumns, locked_sites
from fastlock.judgement import is_rewritten
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import Receipt, columns_digest, weights_digest

# So many numbers are compared at a time, in float64.
_BLOCK_NUMBERS = 2**20
# SHA-256 of columns, by layer and heads.
_Digests = dict[tuple[int, tuple[int, ...]], bytes]


class StoredGate:
    """The gate of a lock in the weights of a checkpoint whose receipt names that lock."""

    def __init__(self, checkpoint: Checkpoint, receipt: Receipt, lock: Lock) -> None:
        """Open what is kept.

        Raises:
            DamagedError: the receipt cannot be true of this checkpoint, or what is kept is damaged.
        """
        self._checkpoint, self._receipt, self._gates = checkpoint, receipt, lock.gates(receipt.strength)
        self._sites = locked_sites(checkpoint, receipt)
        self._originals = OriginalColumns(checkpoint.files, checkpoint.where)
        self._kept, self._present = _Digests(), _Digests()  # of what was read

    def before(self, site: StoredSite, heads: tuple[int, ...]) -> HeadColumns:
        """The columns of a site that the lock was folded through.

        Raises:
            DamagedError: they are not there.
        """
        columns = self._originals.read(site, heads)
        self._kept[site.layer, heads] = columns_digest(columns)
        return HeadColumns.side_by_side(columns, site.head_dim)

    def is_in_place(self, site: StoredSite, before: HeadColumns) -> bool:
        """Whether the columns of now are what the gate makes of those before, within the bound of a right fold."""
        gate = self._gates[site.layer]
        stored = self._checkpoint.read_columns(site, gate.heads)
        self._present[site.layer, gate.heads] = stored.digest()
        now = stored.columns.matrix
        step = max(1, _BLOCK_NUMBERS // now.shape[1])
        blocks = zip(before.matrix.split(step), now.split(step), strict=True)
        return all(is_rewritten(HeadColumns(some, before.starts), gate, found) for some, found in blocks)

    def present_digest(self) -> str:
        """As `Receipt.written_digest`, of the columns of now."""
        return self._digest(self._present, lambda site, heads: self._checkpoint.read_columns(site, heads).digest())

    def kept_others(self) -> str | None:
        """What is to be said if the columns that are kept are not those that the receipt speaks of, as a clause."""
        digest = self._digest(self._kept, lambda site, heads: columns_digest(self._originals.read(site, heads)))
        return None if digest == self._receipt.weights_digest else f"{COLUMNS_FILE} holds others than it was given"

    def _digest(self, known: _Digests, read: Callable[[StoredSite, tuple[int, ...]], bytes]) -> str:
        """The digest over all sites of the receipt; only those that nobody compared are read for it."""
        return weights_digest(known.get((site.layer, heads)) or read(site, heads) for site, heads in self._sites)
