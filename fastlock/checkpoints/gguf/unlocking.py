"""The way back: a relocked GGUF as it was before, byte for byte."""

from __future__ import annotations

import os

from fastlock.checkpoints.gguf.model import GgufModel
from fastlock.checkpoints.gguf.new_files import NewFile, created
from fastlock.checkpoints.gguf.originals import original_parts
from fastlock.checkpoints.gguf.parts import local_path, open_parts
from fastlock.checkpoints.gguf.relocking import data_of, places_for
from fastlock.checkpoints.gguf.saved import receipt_of_parts
from fastlock.errors import FastlockError


def unlock_gguf(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a GGUF model as it was before it was relocked into a new file, byte for byte.

    Args:
        source, out: as for `relock_gguf`.

    Raises:
        DamagedError: the file is damaged, or was changed since it was relocked.
        FastlockError: it is not relocked, or `out` cannot be written.

    After an error nothing is at `out`.
    """
    path = local_path(source)
    model = GgufModel(open_parts(path), str(path))
    receipt = receipt_of_parts(model.parts, model.where)
    if receipt is None:
        raise FastlockError(f"{path}: is not relocked: it has no receipt. There is nothing to unlock.")
    parts = original_parts(model, receipt)
    places = places_for(local_path(out), len(parts))
    files = [
        NewFile(
            place,
            [part.head, data_of(part)],
            [(len(part.head) + offset, data) for offset, data in part.patches],
            part.file.mode,
        )
        for part, place in zip(parts, places, strict=True)
    ]
    with created(files, share=True):
        model.check_unchanged()
