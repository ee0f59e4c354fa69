"""The bytes of a header, fetched piece by piece as it is read: no count or length in it is believed unseen."""

from __future__ import annotations

import struct
from typing import Any

from fastlock.errors import DamagedError
from fastlock.storage.files import DOWNLOAD_AGAIN, File

# What no header exceeds: those of today, vocabulary and merges included, have up to 30 MB.
MAX_HEADER_BYTES = 2**27
_PIECE = 2**20


class ByteReader:
    """The first bytes of a file, read on from the start.

    Attributes:
        at: how many bytes have been passed.
    """

    def __init__(self, file: File, where: str) -> None:
        """Args: `file`; `where` names it in messages."""
        self._file, self._where = file, where
        self._bytes = bytearray()
        self.at = 0

    def passed(self) -> bytes:
        """All bytes from the start of the file to here."""
        return bytes(self._bytes[: self.at])

    def numbers(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The numbers that lie here.

        Raises:
            DamagedError: the file ends before.
        """
        self._fetch(layout.size)
        found = layout.unpack_from(self._bytes, self.at)
        self.at += layout.size
        return found

    def skip(self, length: int) -> None:
        """Pass so many bytes. Raises as `numbers` does."""
        self._fetch(length)
        self.at += length

    def raw(self, length: int) -> bytes:
        """So many bytes. Raises as `numbers` does."""
        self.skip(length)
        return bytes(self._bytes[self.at - length : self.at])

    def skip_strings(self, count: int, length: struct.Struct) -> None:
        """Pass strings, each with its length before it. Raises as `numbers` does."""
        self._check(count * length.size)
        unpack, size = length.unpack_from, length.size
        at, there = self.at, len(self._bytes)
        for _ in range(count):
            if at + size > there:
                there = self._fetch_to(at + size)
            at += size + unpack(self._bytes, at)[0]
            if at > there:
                there = self._fetch_to(at)
        self.at = at

    def _fetch(self, length: int) -> None:
        self._fetch_to(self.at + length)

    def _fetch_to(self, end: int) -> int:
        """Have the bytes up to there; how many there are then."""
        there = len(self._bytes)
        if end > there:
            self._check(end - self.at)
            self._bytes += self._file.read(there, min(max(end - there, _PIECE), self._file.size - there))
            there = len(self._bytes)
            if there < end:
                raise self._cut_short()
        return there

    def _check(self, length: int) -> None:
        if self.at + length > self._file.size:
            raise self._cut_short()
        if self.at + length > MAX_HEADER_BYTES:
            raise DamagedError(
                f"{self._where}: its header has more than {MAX_HEADER_BYTES // 2**20} MiB, which no model needs. "
                f"{DOWNLOAD_AGAIN}"
            )

    def _cut_short(self) -> DamagedError:
        return DamagedError(f"{self._where}: ends before its header does. {DOWNLOAD_AGAIN}")
