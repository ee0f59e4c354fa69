"""The way back: a relocked checkpoint or adapter as it was before, every file byte for byte."""

from __future__ import annotations

import os

from fastlock.checkpoints.adapters.adapter_files import holds_adapter_only
from fastlock.checkpoints.adapters.unlocking import check_not_in_place, unlock_adapter
from fastlock.checkpoints.relocked import carry, original_files, was_relocked_here
from fastlock.checkpoints.resaved import unlock_saved
from fastlock.storage.new_directory import check_paths, create_directory, locked_in_place
from fastlock.storage.places import files_in


def unlock_checkpoint(source: str | os.PathLike[str], out: str | os.PathLike[str], *, in_place: bool = False) -> None:
    """Write the checkpoint as it was before relocking into a new directory: every file, byte for byte.

    Under their own names, links to weights would be written through by whoever saves a model there: they are copied
    (shared blocks where the file system has them); in place, they are moved. A checkpoint that transformers saved from
    a relocked model comes back tensor for tensor, bit for bit. A relocked adapter comes back byte for byte, too; it
    is not changed in place.

    Args:
        source, out, in_place: as for `relock_checkpoint`.

    Raises:
        DamagedError: the checkpoint is damaged, or was changed since it was relocked.
        UnsupportedError: transformers saved it from a relocked model, and one of the two places is a URL.
        FastlockError: it is not relocked, or `out` cannot be written.

    After an error `out` does not exist (at a URL: it holds no config.json); in place, it is as it was.
    """
    source, out = check_paths(source, out, in_place)
    with locked_in_place(out, in_place):
        files = files_in(source)
        if holds_adapter_only(files):
            check_not_in_place(source, in_place)
            unlock_adapter(dict(files), source, out)
            return
        if not was_relocked_here(files):
            unlock_saved(source, out, in_place)
            return
        originals = original_files(files, str(source))
        with create_directory(out, source, in_place) as new:
            for name, file in originals.items():
                carry(new, name, file, copy=file.shared or not in_place)
            for file in originals.values():
                file.check_unchanged()
