"""Which key of a `rank_pattern` or an `alpha_pattern` holds for a module: PEFT's rule, safe from a stranger's patterns.

PEFT takes the first key that stands at the end of a path, as a regular expression, after a dot or nothing
(`get_pattern_key` in peft/utils/other.py).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from fastlock.errors import DamagedError, UnsupportedError, shown

# Keys without these need no regular expression: a dot is the only one of its signs that paths have.
_SIGNS = re.compile(r"[^\w.]")
# Where a repeated part holds a repeated part, matching can take for ever. A comment or a flag can hide that one does.
_UNSAFE = re.compile(r"\)[*+{?]|\(\?(?!:|[=!]|<[=!]|P<)")
# A match tries every length of a repeated part with every choice: all keys together may ask for so many steps.
_REPEATS = re.compile(r"[*+{]|(?<!\()\?")
_MAX_STEPS, _MAX_LENGTH = 2**22, 256
# What the least of a key is worth, in such steps: of a plain one, and of a regular expression, which is compiled.
_PLAIN_STEPS, _COMPILED_STEPS = 2**6, 2**12


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
        UnsupportedError: the keys are too intricate, or too many, to be matched safely.
    """
    if not patterns:
        return default
    if not isinstance(patterns, Mapping):
        raise DamagedError(f"{where}: its {name} is not a JSON object. Download the adapter again.")
    steps = 0
    for key, value in patterns.items():
        steps += _steps(key, path)
        if steps > _MAX_STEPS:
            raise UnsupportedError(
                f"{where}: its {name} is, with the key {shown(key[:80])}, too intricate to be matched safely. Write "
                "out the modules that it means."
            )
        if _matches(key, path, name, where):
            return value
    return default


def _steps(key: str, path: str) -> int:
    """How many steps a match may take; more than there may be, where that cannot be told."""
    if not _SIGNS.search(key):
        return _PLAIN_STEPS
    if len(key) > _MAX_LENGTH or len(path) > _MAX_LENGTH or _UNSAFE.search(key):
        return _MAX_STEPS + 1
    choices = math.prod(part.count("|") + 1 for part in re.split("[()]", key))
    lengths: int = (len(path) + 1) ** (1 + len(_REPEATS.findall(key)))
    return max(_COMPILED_STEPS, choices * lengths)


def _matches(key: str, path: str, name: str, where: str) -> bool:
    if not _SIGNS.search(key):
        tail = path[len(path) - len(key) :] if len(key) <= len(path) else ""
        begins = len(key) == len(path) or path[len(path) - len(key) - 1 : len(path) - len(key)] == "."
        alike = all(a in (".", b) for a, b in zip(key, tail, strict=False))
        return len(tail) == len(key) and begins and alike
    try:
        return _compiled(key).match(path) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise DamagedError(
            f"{where}: the key {shown(key[:80])} of its {name} is no regular expression ({str(error)[:80]}). Download "
            "the adapter again."
        ) from None


@functools.lru_cache(_MAX_STEPS // _COMPILED_STEPS)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
