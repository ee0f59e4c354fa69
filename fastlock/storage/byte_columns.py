"""Some columns of a matrix of bytes: a patch that leaves what lies between them as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ByteColumns:
    """New bytes for runs of columns in a row-major matrix of bytes. Its length is that of the whole matrix.

    Attributes:
        name: something that is the same exactly for the same bytes: they may be many, and not there yet.
        rows: how many rows the matrix has.
        row_bytes: how long each is.
        starts: where in a row each run begins.
        run_bytes: how long each is.
        make: gives the new bytes, the runs side by side: [rows, len(starts) * run_bytes] uint8.
    """

    name: str
    rows: int
    row_bytes: int
    starts: tuple[int, ...]
    run_bytes: int
    make: Callable[[], Bytes] = field(repr=False)

    def __len__(self) -> int:
        return self.rows * self.row_bytes

    def over(self, data: bytes, first: int) -> bytes:
        """Bytes of the matrix from `first` on, with the new ones in their place."""
        top, left = divmod(first, self.row_bytes)
        bottom = -(-(first + len(data)) // self.row_bytes)
        whole = np.empty((bottom - top, self.row_bytes), np.uint8)
        part = whole.reshape(-1)[left : left + len(data)]
        part[:] = np.frombuffer(data, np.uint8)
        new = self.make()[top:bottom]
        for i, start in enumerate(self.starts):
            whole[:, start : start + self.run_bytes] = new[:, i * self.run_bytes : (i + 1) * self.run_bytes]
        return part.tobytes()
