"""The bases of a zoo: by which names adapters call them, and where each is relocked for those that share it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fastlock.checkpoints.adapters.adapter_files import is_adapter
from fastlock.errors import FastlockError, shown
from fastlock.storage.files import CONFIG, parse_object, read_all
from fastlock.storage.places import Place, as_place, below, file_at
from fastlock.zoo.find import HUB_PREFIX

# Between organisation and model in the names of a Hugging Face cache.
HUB_SEPARATOR = "--"
_ORGANISED = re.compile(r"[^/]+/[^/]+")
# One base, several, or several by the name that adapters call each by.
Bases: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]"


@dataclass(frozen=True)
class ZooBase:
    """A base that adapters may be of.

    Attributes:
        place: its directory or URL.
        name: what it is called: `org--model` in a Hugging Face cache, else its last path component.
        names: what adapters may call it, each in lower case: its path, its name with its organisation.
        locked: where it is relocked, if adapters need that: below the directory of the results; "" if nothing is
            written.
        problem: why no adapter can be folded over it; "" if one can.
    """

    place: str
    name: str
    names: frozenset[str]
    locked: str = ""
    problem: str = ""

    @property
    def last_names(self) -> frozenset[str]:
        """The last component of each of its names."""
        return frozenset(name.rpartition("/")[2] for name in self.names)


def places_of(bases: Bases | None) -> list[tuple[str | None, Place]]:
    """Each base with the name that it was given by, None where it was given by none.

    Raises:
        FastlockError: one of them is not a path.
    """
    if bases is None:
        return []
    if isinstance(bases, Mapping):
        return [(name, as_place(place)) for name, place in bases.items()]
    if isinstance(bases, (str, os.PathLike)) or not isinstance(bases, Sequence):
        return [(None, as_place(bases))]
    return [(None, as_place(place)) for place in bases]


def adapter_bases(bases: Bases | None, out: Place | None = None) -> tuple[ZooBase, ...]:
    """The bases of a zoo's adapters.

    Args:
        bases: as they were given; of one whose config.json alone is given no adapter can be folded.
        out: the directory of the results.

    Raises:
        FastlockError: there is none at one of the places.
    """
    found: list[ZooBase] = []
    for given, as_given in places_of(bases):
        place = as_given if isinstance(as_given, str) else as_given.expanduser().absolute()
        called = _name_of(place)
        taken = sum(base.name == called for base in found)
        locked = "" if out is None else str(below(out, f"{called}-locked{f'-{taken + 1}' if taken else ''}"))
        problem = _problem(place)
        names = _names(_called(given, place, called, {} if problem else _config(place)))
        found.append(ZooBase(str(place), called, names, locked, problem))
    return tuple(found)


def base_of(adapter: str, named: str | None, bases: Sequence[ZooBase]) -> ZooBase:
    """The base among these that an adapter is of.

    Args:
        adapter: its directory, for messages.
        named: its `base_model_name_or_path`, None where it names none: then it is of the only base there is.
        bases: of `adapter_bases`.

    Raises:
        FastlockError: it is of none of them, or which one cannot be told.
    """
    calls = f"is of the base {shown(named)[:200]!a}" if named else "names no base"
    if not bases:
        what, which = (calls, "that") if named else ("names none", "the")
        raise FastlockError(
            f"{adapter}: is an adapter, which is relocked over its base, and {what}. Give {which} base's directory: "
            "--base DIR."
        )
    fitting = _named_so(named, bases) if named else list(bases)
    known = " and ".join(base.place for base in bases)
    if not fitting:
        raise FastlockError(
            f"{adapter}: {calls}, and --base gives {known}. Give that base, too: --base DIR. If it is one of these "
            "under another name, say so: --base NAME=DIR."
        )
    if len(fitting) > 1:
        raise FastlockError(
            f"{adapter}: {calls}, which may be {' or '.join(base.place for base in fitting)}. Say which: --base "
            "NAME=DIR, or relock it by itself: fastlock relock ADAPTER --base DIR."
        )
    if fitting[0].problem:
        raise FastlockError(f"{adapter}: is an adapter of {fitting[0].place}, which {fitting[0].problem}")
    return fitting[0]


def _named_so(named: str, bases: Sequence[ZooBase]) -> list[ZooBase]:
    """The bases that go by a name: by all of it, or else by its last component."""
    asked = {name for name in (_plain(named), _plain(_real(named))) if name}
    exact = [base for base in bases if not base.names.isdisjoint(asked)]
    last = {name.rpartition("/")[2] for name in asked}
    # Of a base in a Hugging Face cache the organisation is known, and another one's model of that name is another.
    others = [base for base in bases if not (HUB_SEPARATOR in base.name and _ORGANISED.fullmatch(named))]
    return exact or [base for base in others if not base.last_names.isdisjoint(last)]


def _called(given: str | None, place: Place, name: str, config: dict[str, Any]) -> Iterable[str | None]:
    """What adapters may call a base: nothing but the name that it was given by, if it was."""
    if given is not None:
        return [given, str(place), _real(str(place))]
    return [str(place), _real(str(place)), name.replace(HUB_SEPARATOR, "/", 1), config.get("_name_or_path")]


def _names(texts: Iterable[str | None]) -> frozenset[str]:
    return frozenset(plain for text in texts if (plain := _plain(text)))


def _plain(text: Any) -> str:
    """A name as it is compared: in lower case, and without a slash at its end."""
    return text.strip().rstrip("/").lower() if isinstance(text, str) else ""


def _real(text: str) -> str | None:
    """A path with all links followed; None where nothing is there."""
    try:
        return os.path.realpath(text) if os.path.exists(text) else None
    except (OSError, ValueError):
        return None


def _name_of(place: Place) -> str:
    parts = str(place).rstrip("/").split("/")
    hub = [part for part in parts if part.startswith(HUB_PREFIX)]
    return hub[-1].removeprefix(HUB_PREFIX) if hub else Path(parts[-1]).name


def _problem(place: Place) -> str:
    """Why a base's place is no base of adapters."""
    if file_at(place) is not None:
        return "is a config alone. Give the base's directory, with its weights: --base DIR."
    if file_at(below(place, CONFIG)) is None:
        if is_adapter(place):
            raise FastlockError(f"{place}: is an adapter itself, and no base. Give the base's directory: --base DIR.")
        raise FastlockError(f"{place}: no {CONFIG} is there. Give one, or the checkpoint's directory that holds it.")
    return ""


def _config(place: Place) -> dict[str, Any]:
    file = file_at(below(place, CONFIG))
    return {} if file is None else parse_object(read_all(file, str(place)), str(place))
