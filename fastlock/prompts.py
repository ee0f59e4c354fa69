"""What a model is asked to see what a lock does to it: harmful requests, harmless ones, and ordinary text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlock.errors import FastlockError
from fastlock.files import as_path, read_bounded

MAX_FILE_BYTES = 64 * 1024 * 1024

# The column that holds the prompt in AdvBench, HarmBench, StrongREJECT, and OR-Bench or XSTest.
_COLUMNS = ("goal", "Behavior", "forbidden_prompt", "prompt", "question", "text")
_SHIPPED = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompts:
    """What to ask.

    Attributes:
        harmful: requests that an aligned model refuses.
        harmless: requests that it answers, some of which only sound harmful.
        texts: ordinary text, for the perplexity.

    Raises:
        FastlockError: something in them is no text, or there is nothing in any of them.
    """

    harmful: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if isinstance(given, str) or not all(isinstance(text, str) and text.strip() for text in given):
                raise FastlockError(f"`{name}`: give a list of texts, none of them empty.")
        if not (self.harmful or self.harmless or self.texts):
            raise FastlockError("there is nothing to ask: give harmful or harmless prompts, or texts.")


def shipped_prompts() -> Prompts:
    """The set that comes with fastlock: 40 harmful requests, mild in their wording, 40 harmless ones, 10 texts."""
    return Prompts(**{key: tuple(texts) for key, texts in json.loads(_SHIPPED.read_text()).items()})


def prompts_digest(prompts: Prompts) -> str:
    """SHA-256 of all that is asked."""
    return hashlib.sha256(json.dumps(vars(prompts)).encode()).hexdigest()


def load_prompts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompts from a file: CSV with a header, JSON, JSON lines, or plain text with one on each line.

    In CSV and JSON the prompt is in the column `goal` (AdvBench), `Behavior` (HarmBench), `forbidden_prompt`
    (StrongREJECT), `prompt` (OR-Bench, XSTest), `question` or `text`. Of XSTest's file, whose column `label` says
    "safe" or "unsafe", take the half that is wanted first.

    Raises:
        FastlockError: the file is missing, too large or damaged, or holds no prompts.
    """
    path = as_path(path)
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
        prompts = tuple(_prompts(text, path))
    except (UnicodeDecodeError, ValueError, TypeError, RecursionError, csv.Error) as error:
        raise FastlockError(f"{path}: can't be read as {path.suffix or 'text'} ({error}).") from None
    if not prompts:
        raise FastlockError(f"{path}: holds no prompts.")
    return prompts


def _prompts(text: str, path: Path) -> Iterable[str]:
    if path.suffix == ".csv":
        return [
            _prompt(row, f"{path}, row {number}") for number, row in enumerate(csv.DictReader(io.StringIO(text)), 1)
        ]
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        return [_prompt(json.loads(line), f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if path.suffix == ".json":
        return [_prompt(entry, f"{path}, entry {number}") for number, entry in enumerate(json.loads(text), 1)]
    return [line.strip() for line in lines]


def _prompt(entry: Any, where: str) -> str:
    found = entry if isinstance(entry, str) else None
    if isinstance(entry, dict):
        found = next((entry[column] for column in _COLUMNS if entry.get(column)), None)
    if not isinstance(found, str) or not found.strip():
        raise FastlockError(f"{where}: no prompt is there. Name its column one of {', '.join(_COLUMNS)}.")
    return found.strip()
