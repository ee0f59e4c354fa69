"""A band's file: JSON, written and read strictly. It may be a stranger's: what is not known in it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from fastlock.errors import DamagedError, FastlockError, UnsupportedError, is_unicode
from fastlock.locks.band_evidence import AngleCurve, BandEvidence, RangeCount, RangeTest
from fastlock.storage.files import parse_object

FORMAT = "fastlock-band"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 4 * 1024 * 1024
REMEDY = "Get the file again, or locate the band again: fastlock locate."

FIELDS = ("first", "last", "num_layers", "model_type", "base_model", "source", "evidence")

_HEX = frozenset("0123456789abcdef")


def serialized(fields: Mapping[str, Any]) -> bytes:
    """The bytes of a band's file.

    Args:
        fields: those of `Band`, by name.
    """
    evidence = fields["evidence"]
    data = {"format": FORMAT, "format_version": FORMAT_VERSION, **fields}
    data["evidence"] = None if evidence is None else asdict(evidence)
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def read(data: bytes, where: str) -> dict[str, Any]:
    """The fields of `Band` in a file; which layers can be a band is for `Band` to say.

    Args:
        data: the file's bytes.
        where: the file's name, for messages.

    Raises:
        UnsupportedError: the file is of a newer format.
        DamagedError: something in it is missing, unknown, or of another kind than it must be.
        FastlockError: it is JSON, but not a band.
    """
    found = parse_object(data, where, REMEDY)
    if found.pop("format", None) != FORMAT:
        raise FastlockError(f'{where}: not a band (it lacks "format": "{FORMAT}"). Give a file that `save` wrote.')
    version = found.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnsupportedError(
            f"{where}: band format version {version!r:.40}; this fastlock reads {FORMAT_VERSION}. Upgrade fastlock."
        )
    try:
        return _fields(found)
    except ValueError as error:
        raise DamagedError(f"{where}: the band's file is damaged ({error}). {REMEDY}") from None


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    fields = _record(found, "the band", _BAND)
    evidence = fields["evidence"]
    if evidence is not None:
        fields["evidence"] = _evidence(evidence, fields["num_layers"])
    return fields


def _evidence(evidence: dict[str, Any], num_layers: int | None) -> BandEvidence:
    values = _record(evidence, "the evidence", _EVIDENCE)
    curve = AngleCurve(**_record(values["curve"], "the curve", _CURVE))
    lengths = {len(getattr(curve, name)) for name in ("normal", "malicious", "mixed", "borderline")}
    if len(lengths) != 1 or (num_layers is not None and lengths != {num_layers}):
        raise ValueError(f"its curve has {sorted(lengths)} layers, the model {num_layers}")
    values["curve"] = curve
    values["counts"] = tuple(RangeCount(**_record(one, "a count", _COUNT)) for one in values["counts"])
    values["tests"] = tuple(RangeTest(**_record(one, "a test", _TEST)) for one in values["tests"])
    if any(count.refused > count.judged for count in values["counts"]):
        raise ValueError("a count has more refusals than answers")
    return BandEvidence(**values)


def _record(found: Any, what: str, kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    """The values of an object, which has exactly these keys, each of its kind."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not an object")
    if unknown := sorted(found.keys() - kinds.keys()):
        raise ValueError(f"{what} has the unknown key {unknown[0][:80]!a}")
    if missing := sorted(kinds.keys() - found.keys()):
        raise ValueError(f"{what} lacks {missing[0]}")
    return {name: kind(found[name], f"{what}: {name}") for name, kind in kinds.items()}


_Kind = Callable[[Any, str], Any]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_FILE_BYTES or not is_unicode(value):
        raise ValueError(f"{what} is not text")
    return value


def _digest(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or not _HEX.issuperset(value):
        raise ValueError(f"{what} is not a SHA-256")
    return value


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or not -1 <= value < 2**31:
        raise ValueError(f"{what} is not a sound integer")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not -1e9 < value < 1e9:  # which NaN is not either
        raise ValueError(f"{what} is not a sound number")
    return float(value)


def _share(value: Any, what: str) -> float:
    share = _number(value, what)
    if not 0 <= share <= 1:
        raise ValueError(f"{what} is not between 0 and 1")
    return share


def _truth(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{what} is not true or false")
    return value


def _angles(value: Any, what: str) -> tuple[float, ...]:
    angles = tuple(_number(one, what) for one in _entries(value, what))
    if not all(math.isfinite(angle) and 0 <= angle <= 180 for angle in angles):
        raise ValueError(f"{what} holds what is no angle")
    return angles


def _entries(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")
    return value


def _range(value: Any, what: str) -> tuple[int, int] | None:
    if value is None:
        return None
    ends = [_integer(one, what) for one in _entries(value, what)]
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
        raise ValueError(f"{what} is not a first and a last layer")
    return ends[0], ends[1]


def _or_none(kind: _Kind) -> _Kind:
    return lambda value, what: None if value is None else kind(value, what)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    return value


_BAND: dict[str, _Kind] = {
    "first": _integer,
    "last": _integer,
    "num_layers": _or_none(_integer),
    "model_type": _or_none(_text),
    "base_model": _or_none(_text),
    "source": _or_none(_text),
    "evidence": _or_none(_object),
}
_EVIDENCE: dict[str, _Kind] = {
    "reason": _text,
    "judge": _text,
    "prompts": _digest,
    "normal": _integer,
    "malicious": _integer,
    "borderline": _integer,
    "new_tokens": _integer,
    "curve": _object,
    "first_range": _range,
    "counts": _entries,
    "tests": _entries,
}
_CURVE: dict[str, _Kind] = {
    "normal": _angles,
    "malicious": _angles,
    "mixed": _angles,
    "borderline": _angles,
    "threshold": _number,
}
_COUNT: dict[str, _Kind] = {
    "first": _integer,
    "last": _integer,
    "scale": _number,
    "refused": _integer,
    "judged": _integer,
    "low": _share,
    "high": _share,
}
_TEST: dict[str, _Kind] = {
    "first": _integer,
    "last": _integer,
    "elsewhere": _truth,
    "only_best": _integer,
    "only_other": _integer,
    "p": _share,
}
