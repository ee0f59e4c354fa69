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

from fastlock.data.shipped import shipped_file
from fastlock.errors import DamagedError, FastlockError, is_unicode
from fastlock.storage.files import parse_json, read_bounded
from fastlock.storage.places import as_path

MAX_FILE_BYTES = 64 * 1024 * 1024

# The columns that hold the prompt in AdvBench and JailbreakBench, HarmBench, StrongREJECT, and OR-Bench or XSTest; in
# capitals or not.
_COLUMNS = ("goal", "behavior", "forbidden_prompt", "prompt", "question", "text")
# HarmBench's column for what a request is about, and what HarmBench puts between that and the request.
_CONTEXT, _BETWEEN = "contextstring", "\n\n---\n\n"


@dataclass(frozen=True)
class Prompts:
    """What to ask.

    Attributes:
        harmful: requests that an aligned model refuses.
        harmless: requests that it answers, some of which only sound harmful.
        texts: ordinary text, for the perplexity.

    Raises:
        FastlockError: something in them is not a text, or all of them are empty.
    """

    harmful: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            texts = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ("",)
            if not all(map(_is_text, texts)):
                raise FastlockError(f"`{name}`: give a list of texts, none of them empty or with half a character.")
            object.__setattr__(self, name, texts)  # a generator can be read only once
        if not (self.harmful or self.harmless or self.texts):
            raise FastlockError("there is nothing to ask: give harmful or harmless prompts, or texts.")


def shipped_prompts() -> Prompts:
    """The set that comes with fastlock: 40 harmful requests, mild in their wording, 40 harmless ones, 10 texts."""
    return Prompts(**{key: tuple(texts) for key, texts in json.loads(shipped_file("prompts.json").read_text()).items()})


def prompts_digest(prompts: Prompts) -> str:
    """SHA-256 (hex) of all that is asked."""
    return hashlib.sha256(json.dumps(vars(prompts)).encode()).hexdigest()


def load_prompts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompts from a file: CSV with a header, JSON, JSON lines, or plain text with one prompt on each line.

    In CSV and JSON, the prompt is in the column `goal` (AdvBench, JailbreakBench), `Behavior` (HarmBench),
    `forbidden_prompt` (StrongREJECT), `prompt` (OR-Bench, XSTest), `question` or `text`, in capitals or not. What
    HarmBench has in `ContextString` goes before it. XSTest's column `label` says "safe" or "unsafe": take the half of
    the file that you want first.

    Raises:
        DamagedError: the file is not what its name says, is too large, or holds no prompts or an entry that is not one.
        FastlockError: the file is missing, or cannot be read.
    """
    path = as_path(path)
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
        prompts = tuple(_prompts(text, path))
    except (ValueError, RecursionError, csv.Error) as error:
        raise DamagedError(f"{path}: cannot be read as {path.suffix or 'text'} ({error}).") from None
    if not prompts:
        raise DamagedError(f"{path}: it holds no prompts.")
    return prompts


def _prompts(text: str, path: Path) -> Iterable[str]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return [
            _prompt(row, f"{path}, row {number}") for number, row in enumerate(csv.DictReader(io.StringIO(text)), 1)
        ]
    if suffix == ".json":
        return [_prompt(entry, f"{path}, entry {number}") for number, entry in enumerate(_list(text, path), 1)]
    lines = [(line.strip(), f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1)]
    if suffix == ".jsonl":
        remedy = "Give a text or an object on each line."
        return [_prompt(parse_json(line, where, remedy), where) for line, where in lines if line]
    return [line for line, _ in lines if line]


def _list(text: str, path: Path) -> list[Any]:
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise DamagedError(f"{path}: cannot be read as .json (it is not a list). Give one list of prompts or objects.")
    return entries


def _prompt(entry: Any, where: str) -> str:
    prompt, context = entry, None
    if isinstance(entry, dict):
        values = {str(column).lower(): value for column, value in entry.items() if value}
        prompt = next((values[column] for column in _COLUMNS if column in values), None)
        context = values.get(_CONTEXT)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DamagedError(f"{where}: there is no prompt. Name its column one of {', '.join(_COLUMNS)}.")
    prompt = prompt.strip()
    if isinstance(context, str) and context.strip():
        prompt = context.strip() + _BETWEEN + prompt
    if not _is_text(prompt):
        raise DamagedError(
            f"{where}: its prompt holds half a character (a lone surrogate). Write it again, or remove it."
        )
    return prompt


def _is_text(value: Any) -> bool:
    """Something to read, without halves of characters (lone surrogates), which no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)
