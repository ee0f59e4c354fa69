"""Which key of a `rank_pattern` or an `alpha_pattern` holds for a module: PEFT's rule, safe from a stranger's patterns.

PEFT takes the first key that stands at the end of a path, as a regular expression, after a dot or nothing
(`get_pattern_key` in peft/utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastlock.errors import DamagedError, UnsupportedError, shown

# Keys without these need no regular expression: a dot is the only one of its signs that paths have.
_SIGNS = re.compile(r"[^\w.]")
# Where a repeated part holds a repeated part, matching can take for ever; so can many repeated parts, or many choices.
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPEATS = re.compile(r"[*+{]|(?<!\()\?")
_MAX_REPEATS, _MAX_CHOICES, _MAX_LENGTH = 2, 12, 256


def value_for(patterns: Any, path: str, default: Any, name: str, where: str) -> Any:
    """The value of the first key that matches a path, or the default.

    Args:
        patterns: the config's `rank_pattern` or `alpha_pattern`: an object, or nothing.
        path: of the module, as PEFT names it in the base.
        default: what holds where no key matches.
        name: of the patterns, for messages.
        where: the adapter, for messages.

    Raises:
        DamagedError: they are not an object, or a key is no regular expression.
        UnsupportedError: a key is too intricate to be matched safely.
    """
    if not patterns:
        return default
    if not isinstance(patterns, Mapping):
        raise DamagedError(f"{where}: its {name} is not a JSON object. Download the adapter again.")
    for key, value in patterns.items():
        if _matches(key, path, name, where):
            return value
    return default


def _matches(key: str, path: str, name: str, where: str) -> bool:
    if not _SIGNS.search(key):
        tail = path[len(path) - len(key) :] if len(key) <= len(path) else ""
        begins = len(key) == len(path) or path[len(path) - len(key) - 1 : len(path) - len(key)] == "."
        alike = all(a in (".", b) for a, b in zip(key, tail, strict=False))
        return len(tail) == len(key) and begins and alike
    long = len(key) > _MAX_LENGTH or len(path) > _MAX_LENGTH
    if (
        long
        or len(_REPEATS.findall(key)) > _MAX_REPEATS
        or key.count("|") > _MAX_CHOICES
        or _REPEATED_GROUP.search(key)
    ):
        raise UnsupportedError(
            f"{where}: the key {shown(key)[:80]} of its {name} is too intricate to be matched safely. Write out the "
            "modules that it means."
        )
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise DamagedError(
            f"{where}: the key {shown(key)[:80]} of its {name} is no regular expression ({str(error)[:80]}). Download "
            "the adapter again."
        ) from None
