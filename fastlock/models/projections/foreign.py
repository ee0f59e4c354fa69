"""Modules of no kind that we know: they have a weight and a bias like a linear layer, but may compute otherwise."""

from __future__ import annotations

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.models.projections.plain import Plain
from fastlock.models.projections.quantised import ON_DISK, packed_for_a_kernel
from fastlock.models.projections.stand_in import StandIn


class Foreign(Plain):
    """A module that cannot be folded: what it calls its weight is not known to be W."""

    def check(self, name: str) -> None:
        """As of `Projection`: it never passes."""
        if isinstance(self.module, StandIn):
            raise FastlockError(f"{name} has locks per request. Remove them first: RequestLocks.remove().")
        if (packed := packed_for_a_kernel(self.module)) is not None:
            raise UnsupportedError(f"{name} is a {packed}. {ON_DISK}")
        cls = type(self.module)
        raise UnsupportedError(
            f"{name} is a {cls.__module__}.{cls.__name__}, not a plain linear layer, nor one of a quantised kind "
            "that fastlock knows. Load the checkpoint unquantised, relock it on disk, or merge its adapters first."
        )
