"""What one stack makes of a checkpoint or an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What one stack makes of a checkpoint.

    Attributes:
        stack: the serving stack.
        acts: whether a lock is there and acts.
        reason: one sentence for people.
    """

    stack: str
    acts: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The finding as data that JSON can hold."""
        return asdict(self)
