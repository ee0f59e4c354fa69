"""A journal of a long benchmark: a line of JSON for each part that is done; a stopped run goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """The parts that are done, kept in a file that is of one run's settings and no other's.

    Its first line says what decides the parts (`settings`, with their digest) and what does not (`facts`: the machine,
    the date); each line after it is one part. A last line that was cut off is dropped.

    Args:
        path: of the file, which is made if it is not there.
        settings: what decides the parts, as JSON can hold it.
        facts: what a reader should know of the run that began it.

    Raises:
        SystemExit: the file is of other settings, or it is no journal.
    """

    def __init__(self, path: Path, settings: Record, facts: Record) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = digest_of(settings)
        if not path.exists() or not path.read_bytes().count(b"\n"):
            path.write_text(_line({"digest": digest, "settings": settings, "facts": facts}))
        head, self.records = read_journal(path)
        if head["digest"] != digest:
            other = [key for key in settings if settings[key] != head["settings"].get(key)]
            raise SystemExit(f"{path}: it is of another run: {', '.join(other) or 'more'} differs. Give another file.")
        whole = path.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]
        if complete != whole:
            os.truncate(path, len(complete))

    def add(self, record: Record) -> None:
        """Keep one more part, at once."""
        with self.path.open("a") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def read_journal(path: Path) -> tuple[Record, list[Record]]:
    """The first line of a journal, and its parts, without a last line that was cut off.

    Raises:
        SystemExit: it is no journal.
    """
    lines = path.read_text().split("\n")[:-1]
    try:
        head, *records = map(json.loads, lines)
        if digest_of(head["settings"]) != head["digest"]:
            raise ValueError("its settings do not have the digest that it says")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: it is not a journal of a benchmark ({error}).") from None
    return head, records


def digest_of(settings: Record) -> str:
    """SHA-256 (hex) of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
