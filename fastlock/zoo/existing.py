"""What is at the place of a result already: the same relock of an earlier run, or something that is in the way."""

from __future__ import annotations

from fastlock.judgement import Applied
from fastlock.locks.lock import Lock


def why_not_this_relock(receipt: Applied | None, lock: Lock, strength: float) -> str | None:
    """How what is there differs from a relock with this lock at this strength, as a clause; None if it does not.

    Args:
        receipt: its own, None where it has none.
        lock, strength: what was asked for.
    """
    if receipt is None:
        return "without a lock"
    if receipt.lock_digest != lock.digest:
        return "with another lock"
    if receipt.strength != strength:
        return f"with the lock at strength {receipt.strength:g}"
    return None


def in_the_way(out: str, state: str) -> str:
    """The sentence that says so.

    Args:
        out: the place.
        state: in which state something is there, as a clause.
    """
    return f"{out}: already exists, {state}. Remove it first, or choose another directory for all of them."
