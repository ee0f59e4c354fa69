"""What a relocked GGUF says of itself, in a metadata entry of its own: the receipt, and what its files were before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlock.checkpoints.gguf.parts import GgufPart
from fastlock.errors import DamagedError
from fastlock.locks.receipt import SavedReceipt
from fastlock.locks.receipt_fields import check_keys, digest_in, index_in
from fastlock.storage.files import parse_object

RECEIPT_KEY = "fastlock.receipt"
_FILES = "files"
# That of the largest models holds the biases that they had before: some megabytes.
_MAX_RECEIPT = 16 * 1024 * 1024
_RELOCK_AGAIN = "Relock the original GGUF again."


@dataclass(frozen=True)
class OriginalFile:
    """One file as it was before it was relocked.

    Attributes:
        head_length: how many bytes came before its data.
        head_digest: their SHA-256, hex.
        data_length: how many bytes of data it had.
    """

    head_length: int
    head_digest: str
    data_length: int

    @classmethod
    def of(cls, part: GgufPart) -> OriginalFile:
        """That of a file that is not relocked."""
        return cls(len(part.head), hashlib.sha256(part.head).hexdigest(), part.data_length)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> OriginalFile:
        """What `to_dict` wrote, out of a file that may have been changed since.

        Raises:
            DamagedError: it is not that.
        """
        try:
            check_keys(data, ("head_length", "head_digest", "data_length"))
            return cls(index_in(data["head_length"]), digest_in(data["head_digest"]), index_in(data["data_length"]))
        except (TypeError, ValueError):
            raise _damaged(where) from None

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return {"head_length": self.head_length, "head_digest": self.head_digest, "data_length": self.data_length}


@dataclass(frozen=True)
class GgufReceipt:
    """What the metadata entry holds.

    Attributes:
        saved: the receipt, and the biases that were there before.
        files: each file of the model as it was before.
    """

    saved: SavedReceipt
    files: tuple[OriginalFile, ...]

    def to_json(self) -> str:
        """As it is written: the same receipt gives the same text, in ASCII."""
        return json.dumps(self.saved.to_dict() | {_FILES: [file.to_dict() for file in self.files]})


def receipt_of_parts(parts: Sequence[GgufPart], where: str) -> GgufReceipt | None:
    """The receipt in a model's first file, None where it has none.

    Raises:
        UnsupportedError: it is of a newer format.
        DamagedError: it is damaged.
    """
    text = parts[0].header.text(RECEIPT_KEY)
    if text is None:
        return None
    if len(text) > _MAX_RECEIPT:
        raise DamagedError(f"{where}: {RECEIPT_KEY} has {len(text)} characters, and no receipt does. {_RELOCK_AGAIN}")
    data = parse_object(text.encode(), f"{where}: {RECEIPT_KEY}", _RELOCK_AGAIN)
    files = data.pop(_FILES, None)
    if not isinstance(files, list) or len(files) != len(parts):
        raise _damaged(where)
    saved = SavedReceipt.from_dict(data, where)
    return GgufReceipt(saved, tuple(OriginalFile.from_dict(file, where) for file in files))


def _damaged(where: str) -> DamagedError:
    return DamagedError(f"{where}: the receipt is damaged ({_FILES}). {_RELOCK_AGAIN}")
