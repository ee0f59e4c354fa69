"""What takes the place of an output projection for a while, and the mark of a projection whose place is taken."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastlock.errors import FastlockError

# In the __dict__ of a module whose place a `StandIn` has taken in one of its models.
REPLACED = "_fastlock_replaced"


class StandIn(nn.Module):
    """A module of fastlock's in the place of an output projection, for locks per request."""


def check_not_replaced(module: Any, name: str) -> None:
    """Refuse a projection that a `StandIn` runs in another model: a bias would act in every request there."""
    if module.__dict__.get(REPLACED):
        raise FastlockError(
            f"{name} is part of another model too, which has locks per request. Remove them first: "
            "RequestLocks.remove()."
        )
