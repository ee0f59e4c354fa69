"""The locked columns as they were before a gate rewrote them: kept beside the new ones, and put back from there.

They are enough: all else in a shard stays as it is. So the original shards need not be kept as well, and a relocked
directory that is moved or uploaded is larger by these columns alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite
from fastlock.checkpoints.layout import COLUMNS_FILE
from fastlock.checkpoints.tensor_index import read_header, shard_header
from fastlock.errors import DamagedError
from fastlock.locks.receipt import Receipt, columns_digest, raw_bytes, weights_digest
from fastlock.storage.byte_columns import ByteColumns, Bytes

# Sites, and their locked heads.
LockedSites = Sequence[tuple[StoredSite, tuple[int, ...]]]
Patches = dict[str, list[tuple[int, ByteColumns]]]


class OriginalColumns:
    """The original columns that a relocked directory keeps."""

    def __init__(self, files: Mapping[str, Any], where: str) -> None:
        """Read the header of the file that keeps them.

        Raises:
            DamagedError: it is not there, or damaged.
        """
        self._where = where
        if COLUMNS_FILE not in files:
            raise self._lost("is not there any more")
        self._file = files[COLUMNS_FILE]
        self._tensors = read_header(self._file, COLUMNS_FILE, where)

    def read(self, site: StoredSite, heads: tuple[int, ...]) -> torch.Tensor:
        """Those of one site, side by side: [hidden, len(heads) * head_dim], in the dtype of the site.

        Raises:
            DamagedError: they are not there.
        """
        stored, shape = self._tensors.get(_name(site)), (site.hidden_size, len(heads) * site.head_dim)
        if stored is None or (stored.torch_dtype, stored.shape) != (site.torch_dtype, shape):
            raise self._lost(f"does not hold those of layer {site.layer}")
        data = bytearray(self._file.read(stored.start, stored.length))
        return torch.frombuffer(data, dtype=site.dtype).view(shape)

    def patches(self, checkpoint: Checkpoint, receipt: Receipt) -> Patches:
        """What puts them back into the files of a relocked checkpoint.

        Raises:
            DamagedError: they are not those that the gate rewrote.
        """
        sites = locked_sites(checkpoint, receipt)
        if digest_of_columns(self.read(*site) for site in sites) != receipt.weights_digest:
            raise self._lost("does not hold those that it was written with")
        return patches_of((*site, receipt.weights_digest, self._reader(*site)) for site in sites)

    def _reader(self, site: StoredSite, heads: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        return lambda: self.read(site, heads)

    def _lost(self, how: str) -> DamagedError:
        return DamagedError(
            f"{self._where}: {COLUMNS_FILE} {how}. It keeps the weights that the lock's gate rewrote, which "
            "therefore cannot be put back. Start from the original checkpoint."
        )


def locked_sites(checkpoint: Checkpoint, receipt: Receipt) -> LockedSites:
    """The sites that a receipt names, and their locked heads.

    Raises:
        DamagedError: the checkpoint lacks one, or has it quantised, which no gate is written into.
    """
    for locked in receipt.sites:
        site = checkpoint.sites[locked.layer] if locked.layer < len(checkpoint.sites) else None
        if site is None or site.quantised or site.torch_dtype is None or max(locked.heads) >= site.num_heads:
            raise DamagedError(
                f"{checkpoint.where}: its receipt says that a gate is in the weights of layer {locked.layer}, heads "
                f"{list(locked.heads)[:64]}, which cannot be. Start from the original checkpoint."
            )
    return [(checkpoint.sites[locked.layer], locked.heads) for locked in receipt.sites]


def present_columns(checkpoint: Checkpoint, sites: LockedSites) -> Iterator[torch.Tensor]:
    """The locked columns that are in a checkpoint's files, one site after the other."""
    return (checkpoint.read_columns(site, heads).columns.matrix for site, heads in sites)


def digest_of_columns(columns: Iterator[torch.Tensor]) -> str:
    """As `Receipt.weights_digest`."""
    return weights_digest(map(columns_digest, columns))


def kept_columns(checkpoint: Checkpoint, sites: LockedSites) -> Iterator[bytes]:
    """The file that keeps the columns of these sites, in pieces."""
    by_name = {_name(site): (site, heads) for site, heads in sites}
    header, order = shard_header(
        {name: (site.dtype, (site.hidden_size, len(heads) * site.head_dim)) for name, (site, heads) in by_name.items()}
    )
    yield header
    yield from map(raw_bytes, present_columns(checkpoint, [by_name[name] for name in order]))


def patches_of(
    columns: Iterator[tuple[StoredSite, tuple[int, ...], str, Callable[[], torch.Tensor]]],
) -> Patches:
    """What puts other columns into a checkpoint's files: where in which of them.

    Args:
        columns: a site, its locked heads, a name that is another for other columns, and what gives the columns.
    """
    patches: Patches = {}
    for site, heads, name, make in columns:
        patches.setdefault(site.weight.file, []).append((site.weight.start, _patch(site, heads, name, make)))
    return patches


def _patch(site: StoredSite, heads: tuple[int, ...], name: str, make: Callable[[], torch.Tensor]) -> ByteColumns:
    whole, run = site.weight.length, site.head_dim * site.dtype.itemsize
    rows = site.hidden_size
    if site.transposed:
        rows, run = 1, run * site.hidden_size

    def made() -> Bytes:
        matrix = make().t() if site.transposed else make()
        return matrix.contiguous().view(torch.uint8).numpy().reshape(rows, -1)

    return ByteColumns(f"{site.name} {name}", rows, whole // rows, tuple(head * run for head in heads), run, made)


def _name(site: StoredSite) -> str:
    return f"{site.name}.columns"
