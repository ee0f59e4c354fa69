"""What every kind of output projection can say of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fastlock.kernels.fold.reference import HeadColumns


class Projection(Protocol):
    """One output projection. Each kind is a file beside this one, and a line in `table.py`."""

    # Whether `matrix` is the module's own memory, so that whoever holds it sees later writes to the weight.
    in_place: bool

    @property
    def matrix(self) -> torch.Tensor:
        """W, [hidden, num_heads * head_dim], detached."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `matrix`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a bias that is put in; of a plain projection that of `matrix`, too."""

    @property
    def device(self) -> torch.device:
        """Where `matrix` is, and a bias must be."""

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
