"""A gate in a checkpoint's weights, checked: folded anew from the columns that were there before, which are kept."""

from __future__ import annotations

from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.layout import ORIGINAL_COLUMNS
from fastlock.checkpoints.original_columns import OriginalColumns, digest_of_columns, locked_sites
from fastlock.judgement import is_rewritten
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import Receipt

# So many numbers are compared at a time, in float64.
_BLOCK_NUMBERS = 2**20


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

    def before(self, site: StoredSite, heads: tuple[int, ...]) -> HeadColumns:
        """The columns of a site that the lock was folded through.

        Raises:
            DamagedError: they are not there.
        """
        return HeadColumns.side_by_side(self._originals.read(site, heads), site.head_dim)

    def is_in_place(self, site: StoredSite, before: HeadColumns) -> bool:
        """Whether the columns of now are what the gate makes of those before, within the bound of a right fold."""
        gate = self._gates[site.layer]
        now = self._checkpoint.read_columns(site, gate.heads).columns.matrix
        step = max(1, _BLOCK_NUMBERS // now.shape[1])
        blocks = zip(before.matrix.split(step), now.split(step), strict=True)
        return all(is_rewritten(HeadColumns(some, before.starts), gate, found) for some, found in blocks)

    def kept_others(self) -> str | None:
        """What is to be said if the columns that are kept are not those that the receipt speaks of, as a clause."""
        digest = digest_of_columns(self._originals.read(*site) for site in self._sites)
        return None if digest == self._receipt.weights_digest else f"{ORIGINAL_COLUMNS} holds others than it was given"
