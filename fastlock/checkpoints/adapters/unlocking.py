"""The way back: a relocked adapter as it was before, every file byte for byte."""

from __future__ import annotations

from typing import Any

from fastlock.checkpoints.adapters.adapter_files import JoinedFile, SplicedFile
from fastlock.checkpoints.adapters.relocked import adapter_receipt_in, original_adapter_files
from fastlock.checkpoints.relocked import carry
from fastlock.errors import FastlockError, UnsupportedError
from fastlock.storage.new_directory import NewDirectory, create_local_directory
from fastlock.storage.places import Place


def unlock_adapter(files: dict[str, Any], source: Place, out: Place) -> None:
    """Write an adapter as it was before it was relocked into a new directory: every file, byte for byte.

    Args:
        files: of the relocked adapter's directory.
        source: that directory.
        out: the directory to make.

    Raises:
        UnsupportedError: `out` is a URL.
        DamagedError: the adapter is damaged, or was changed since it was relocked.
        FastlockError: it is not relocked, or `out` cannot be written.
    """
    where = str(source)
    if adapter_receipt_in(files, where) is None:
        raise FastlockError(f"{where}: is an adapter that is not relocked. There is nothing to take out.")
    originals, target = original_adapter_files(files, where), local_only(out)
    with create_local_directory(target, source, in_place=False) as new:
        for name, file in originals.items():
            put(new, name, file, copy=True)
        for file in originals.values():
            file.check_unchanged()


def put(new: NewDirectory, name: str, file: Any, copy: bool) -> None:
    """Put a file into a new directory under a name: linked, or copied if that is asked for or it was never written."""
    if isinstance(file, SplicedFile | JoinedFile):
        new.write_parts(name, file.parts())
    else:
        carry(new, name, file, copy)


def check_not_in_place(adapter: Place, in_place: bool) -> None:
    """Refuse to change an adapter itself.

    Raises:
        FastlockError: that is asked for.
    """
    if in_place:
        raise FastlockError(f"{adapter}: an adapter is not changed in place. Give --out DIR, a new directory.")


def local_only(out: Place) -> Any:
    """The path to make an adapter at.

    Raises:
        UnsupportedError: it is on another machine.
    """
    if isinstance(out, str):
        raise UnsupportedError(f"{out}: adapters are written to this machine only. Give a path here, and upload it.")
    return out
