"""What the fields of a receipt may hold, read strictly: whatever else is there is a TypeError or a ValueError.

A receipt of a checkpoint and one of an adapter have the same kinds of fields.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from fastlock.dtypes import BY_TORCH_NAME
from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.locks.gate import MAX_RANK
from fastlock.locks.lock import check_strength

T = TypeVar("T")
_DIGEST = re.compile("[0-9a-f]{64}")
_DECIMAL = re.compile("0|[1-9][0-9]{0,8}")


def damaged_receipt(where: str, error: Exception) -> DamagedError:
    """The error that says so."""
    return DamagedError(
        f"{where}: the receipt is damaged ({type(error).__name__}: {str(error)[:200]}). Download the checkpoint again, "
        "or relock its original."
    )


def check_version(data: Any, where: str, *known: int) -> int:
    """The version of the format that a receipt has; any but the `known` ones are refused."""
    version = object_in(data).get("format_version")
    if type(version) is not int:  # true and 1.0 are equal to 1
        raise TypeError(f"{str(version)[:80]!a} where the format's version should be")
    if version not in known:
        reads = " and ".join(map(str, known))
        raise UnsupportedError(
            f"{where}: receipt format {str(version)[:40]}; this fastlock reads {reads}. Upgrade fastlock."
        )
    return version


def check_keys(data: Any, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Refuse an object that lacks a required key, or has one that is neither required nor optional."""
    keys = object_in(data).keys()
    if unknown := sorted(map(str, keys - {*required, *optional})):
        raise ValueError(f"it has the key {unknown[0][:80]!a}, which no receipt has")
    if missing := [key for key in required if key not in keys]:
        raise ValueError(f"it lacks the key {missing[0]!a}")


def optional(data: dict[str, Any], key: str, read: Callable[[Any], T]) -> T | None:
    """What a key holds, read; None where it is not there."""
    return read(data[key]) if key in data else None


def strength_in(value: Any) -> float:
    """A strength: a finite number, 0 or more."""
    try:
        return check_strength(value)
    except FastlockError as error:
        raise ValueError(str(error)) from None


def text_in(value: Any) -> str:
    """ASCII text."""
    if not isinstance(value, str) or not value.isascii():
        raise TypeError(f"{str(value)[:80]!a} where ASCII text should be")
    return value


def digest_in(value: Any) -> str:
    """A SHA-256, as 64 lower-case hexadecimal digits."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise TypeError(f"{str(value)[:80]!a} where a digest should be")
    return value


def dtype_in(value: Any) -> str:
    """The name of a dtype that fastlock folds."""
    if not isinstance(value, str) or value not in BY_TORCH_NAME:
        raise TypeError(f"{str(value)[:80]!a} where one of {', '.join(BY_TORCH_NAME)} should be")
    return value


def dtypes_in(value: Any) -> tuple[str, ...]:
    """A list of such names, not empty."""
    return tuple(map(dtype_in, list_in(value)))


def flag_in(value: Any) -> bool:
    """True or false, and no number."""
    if not isinstance(value, bool):
        raise TypeError(f"{str(value)[:80]!a} where true or false should be")
    return value


def index_in(value: Any) -> int:
    """An integer, 0 or more."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:80]!a} where an index should be")
    return value


def rank_in(value: Any) -> int:
    """The rank of a gate."""
    if not 1 <= index_in(value) <= MAX_RANK:
        raise ValueError(f"{value} where the rank of a gate should be")
    return int(value)


def list_in(value: Any) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise TypeError(f"{str(value)[:80]!a} where a list should be")
    return value


def object_in(value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:80]!a} where a JSON object should be")
    return value


def texts_in(value: Any) -> tuple[str, ...]:
    """A list of ASCII text, not empty."""
    return tuple(map(text_in, list_in(value)))


def digests_in(value: Any) -> dict[str, str]:
    """An object whose values are digests."""
    return {name: digest_in(digest) for name, digest in object_in(value).items()}


def encoded_biases(biases: Mapping[int, bytes]) -> dict[str, str]:
    """Original biases, by layer, as JSON holds them: layers in decimal and ascending, numbers in base64."""
    return {str(layer): base64.b64encode(bias).decode() for layer, bias in sorted(biases.items())}


def biases_in(value: Any) -> dict[int, bytes]:
    """What `encoded_biases` wrote."""
    return {_layer(key): _bias(key, text) for key, text in object_in(value).items()}


def check_ascending(numbers: Sequence[int], what: str) -> None:
    """Refuse numbers that do not ascend; `what` they are is for the message."""
    if any(after <= before for before, after in pairwise(numbers)):
        raise ValueError(f"its {what} are not in ascending order, each once")


def _layer(key: Any) -> int:
    if not isinstance(key, str) or not _DECIMAL.fullmatch(key):
        raise ValueError(f"{str(key)[:80]!a} where the number of a layer should be")
    return int(key)


def _bias(key: str, text: Any) -> bytes:
    try:
        data = base64.b64decode(text_in(text), validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the original bias of layer {key}: {error}") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError(f"the original bias of layer {key} is not as base64 is written")
    return data
