"""The one exception type that fastlock raises for what a user or a file got wrong."""

import os


class FastlockError(Exception):
    """Something a user, a model or a file got wrong.

    The message says what was wrong, where, and what to do about it. A `FastlockError` never leaves
    half a result behind: the model or the file is as it was before the call.
    """


def check_number(name: str, value: int, low: int, high: int, of: str = "") -> None:
    """Refuse what is no whole number from `low` to `high`; `of` is said of the limits."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FastlockError(f"{name} is {value!r}; it must be a whole number from {low} to {high}{of}.")


def shown(text: str | os.PathLike[str]) -> str:
    """A name from outside, fit to be shown: what can't be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(text))
