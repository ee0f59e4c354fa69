"""The exceptions that fastlock raises for what a user or a file got wrong, and what their messages need."""

from __future__ import annotations

import os


class FastlockError(Exception):
    """Something a user, a model or a file got wrong.

    The message says what was wrong, where, and what to do about it. A `FastlockError` never leaves half a result
    behind: the model or the file is as it was before the call. What goes wrong once a result is complete is a
    FastlockWarning, which says what is left to remove. Three kinds can be told apart; wrong arguments, and what
    the file system or the network refuses, are plain FastlockErrors.
    """


class UnsupportedError(FastlockError):
    """What was asked cannot be done in this family or format: another way is needed, and trying again will not help."""


class DamagedError(FastlockError):
    """A file or a model is damaged, hostile, or was changed since fastlock wrote it: another copy is needed."""


class MismatchError(FastlockError):
    """The lock and the model do not belong together: another lock, or another model, is needed."""


class FastlockWarning(RuntimeWarning):
    """Nothing failed, but something beside it went wrong or may be lost later; the message says what to do."""


def check_number(name: str, value: int, low: int, high: int, of: str = "") -> None:
    """Refuse what is not an integer from `low` to `high`; `of` is said of the limits."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FastlockError(f"{name} is {value!r}; it must be an integer from {low} to {high}{of}.")


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: half a character (a lone surrogate), which JSON can name, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str | os.PathLike[str]) -> str:
    """A name from outside, fit to be shown: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(text))
