"""The extraction set: questions, each with a safe and an unsafe answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from fastlock.data.shipped import shipped_file, shipped_lines
from fastlock.errors import DamagedError, FastlockError, is_unicode
from fastlock.storage.files import parse_rows, read_bounded

MAX_FILE_BYTES = 256 * 1024 * 1024

_KEYS = ("question", "safe", "unsafe")
_AUTHORS_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_PREFERENCE_KEYS = ("prompt", "chosen", "rejected")
_LAYOUT = "Pairs are JSON lines, one object per line, or one JSON array of objects."


@dataclass(frozen=True)
class Pair:
    """A question with the answer that an aligned model should give and one that it should not.

    Attributes:
        question: what the user asks, in one text.
        safe: a refusal, say.
        unsafe: the beginning of a compliant answer, say.

    Raises:
        FastlockError: a text is missing, empty or not a text, or both answers are the same.
    """

    question: str
    safe: str
    unsafe: str

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_text(field.name, getattr(self, field.name))
        if self.safe.strip() == self.unsafe.strip():
            raise FastlockError(
                f"the safe and the unsafe answer to {_shortened(self.question)} are the same text. Give two different "
                "answers, or remove the pair."
            )


def load_pairs(path: str | os.PathLike[str]) -> tuple[Pair, ...]:
    """Read pairs from a file: JSON lines, or one JSON array.

    Every entry has `question`, `safe` and `unsafe`; or, as in the data of the paper's authors (GitHub:
    zhu-minjun/SafetyLock), `question`, `answer_matching_behavior` (the safe answer) and `answer_not_matching_behavior`
    (the unsafe one); or, as in preference data (TRL's format), `prompt`, `chosen` (safe) and `rejected` (unsafe). Other
    keys are ignored.

    Each value is a text, or in chat format: a list of one message, `{"role": "user", "content": "…"}` or with the role
    "assistant". An answer may follow its question in one list; then the prompt may be left out, as TRL does.

    Raises:
        DamagedError: the file is too large or not JSON, or holds no pairs or an entry that is not a usable `Pair`; the
            message names the entry.
        FastlockError: the file is missing, or cannot be read.
    """
    path = Path(path)
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: not a text in UTF-8 ({error}). Save it as UTF-8.") from None
    try:
        pairs = tuple(pair_from(entry, where) for where, entry in parse_rows(text, str(path), _LAYOUT))
    except FastlockError as error:
        raise DamagedError(str(error)) from None
    if not pairs:
        raise DamagedError(f"{path}: it holds no pairs. Write one JSON object per line, with {', '.join(_KEYS)}.")
    return pairs


def shipped_pairs() -> tuple[Pair, ...]:
    """The 100 pairs that come with fastlock, mild in their wording: refusals, and the first words of compliance."""
    return load_pairs(shipped_file("pairs.jsonl"))


def shipped_harmless() -> tuple[str, ...]:
    """The 100 harmless prompts that come with fastlock; none of them is in `shipped_prompts`."""
    return shipped_lines("harmless.txt")


def shipped_scary() -> tuple[str, ...]:
    """The 60 harmless prompts with fastlock that only sound harmful; none is about what `shipped_prompts` ask about."""
    return shipped_lines("scary.txt")


def shipped_texts() -> tuple[str, ...]:
    """The 16 ordinary texts that come with fastlock; none of them is in `shipped_prompts`."""
    return shipped_lines("texts.txt")


def pairs_digest(pairs: Iterable[Pair], harmless: Sequence[str] = ()) -> str:
    """SHA-256 (hex) of pairs, and of harmless prompts if there are any, in order, in whatever layout they were."""
    data: list[Any] = [astuple(pair) for pair in pairs]
    data += [list(harmless)] if harmless else []
    return hashlib.sha256(json.dumps(data, separators=(",", ":")).encode()).hexdigest()


def pair_from(entry: Any, where: str) -> Pair:
    """The pair in an object of any layout, or a `Pair` itself.

    Args:
        entry: the object, as JSON has it.
        where: its place, for messages.

    Raises:
        FastlockError: it is not a pair.
    """
    if isinstance(entry, Pair):
        return entry
    if not isinstance(entry, Mapping):
        raise FastlockError(
            f"{where}: it is of type {type(entry).__name__}; it must be an object with {', '.join(_KEYS)}."
        )
    try:
        pair = _pair(entry)
    except FastlockError as error:
        raise FastlockError(f"{where}: {error}") from None
    if pair is None:
        keys = _shortened(", ".join(map(str, entry))) if entry else "none"
        raise FastlockError(
            f"{where}: a pair has the keys {', '.join(_KEYS)}, or {', '.join(_PREFERENCE_KEYS)}, or the authors' "
            f"{', '.join(_AUTHORS_KEYS)}; this one has {keys}."
        )
    return pair


def _pair(entry: Mapping[str, Any]) -> Pair | None:
    """The pair in an object, whose texts may be messages; None where it has other keys."""
    for question_key, *answer_keys in (_KEYS, _AUTHORS_KEYS, _PREFERENCE_KEYS):
        if all(key in entry for key in (question_key, *answer_keys)):
            question = _content(question_key, entry[question_key], "user")
            return Pair(question, *(_answer(key, entry[key], question) for key in answer_keys))
    _, *answer_keys = _PREFERENCE_KEYS
    if all(isinstance(entry.get(key), (list, tuple)) for key in answer_keys):
        question = _content("chosen", entry["chosen"][:1], "user")
        return Pair(question, *(_answer(key, entry[key], question) for key in answer_keys))
    return None


def _answer(name: str, value: Any, question: str) -> Any:
    """The text of an answer, which in chat format may follow the question."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        first = value[0].get("role"), value[0].get("content")
        value = value[first == ("user", question) :]
    return _content(name, value, "assistant")


def _content(name: str, value: Any, role: str) -> Any:
    """What the one message of a list says; anything but a list is returned unchanged."""
    if not isinstance(value, (list, tuple)):
        return value
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value):
        raise FastlockError(f"`{name}` is a list, but not of messages with a role and a content.")
    roles = [str(message["role"]) for message in value]
    if roles != [role]:
        raise FastlockError(
            f"`{name}` holds the messages {_shortened(', '.join(roles))}; it must be one message, of the {role}. "
            "Longer conversations and system prompts are not read: leave the other messages out, or remove the pair."
        )
    content = value[0]["content"]
    if not isinstance(content, str):
        raise FastlockError(f"`{name}`: its message holds a {type(content).__name__}; it must hold one text.")
    return content


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise FastlockError(
            f"`{name}` is of type {type(text).__name__}; it must be one text, or a list of one message."
        )
    if not text.strip():
        raise FastlockError(f"`{name}` is empty. Write it, or remove the pair.")
    if not is_unicode(text):
        raise FastlockError(
            f"`{name}` holds half a character (a lone surrogate), which no tokenizer reads. Correct it."
        )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
