"""How many bytes this process has moved past the system's own counters: mapped, fetched and sent ones."""

from __future__ import annotations

import threading


class Traffic:
    """Two counters that threads may add to at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = 0
        self._written = 0

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Count bytes that were read or written."""
        with self._lock:
            self._read += read
            self._written += written

    def totals(self) -> tuple[int, int]:
        """The bytes read and the bytes written so far."""
        with self._lock:
            return self._read, self._written


# The one of this process, as there is one /proc/self/io.
TRAFFIC = Traffic()
