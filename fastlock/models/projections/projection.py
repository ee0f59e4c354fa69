"""What every kind of output projection can say of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fastlock.kernels.fold.reference import HeadColumns


class Projection(Protocol):
    """One output projection. Each kind is a file beside this one, and a line in `table.py`."""

    @property
    def matrix(self) -> torch.Tensor:
        """W, [hidden, num_heads * head_dim], detached."""

    @property
    def bias(self) -> torch.Tensor | None:
        """c, [hidden], or None."""

    def head_columns(self, heads: Sequence[int], head_dim: int) -> HeadColumns:
        """The columns of W that these heads' outputs meet, head_dim a head."""

    def check(self, name: str) -> None:
        """Refuse a projection that cannot be folded; `name` says which, for messages.

        Raises:
            UnsupportedError: its weights are not there, or not in a form that can be folded.
            FastlockError: it has locks per request.
        """
