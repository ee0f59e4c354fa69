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
from fastlock.errors import FastlockError
from fastlock.storage.files import read_bounded

MAX_FILE_BYTES = 256 * 1024 * 1024

_KEYS = ("question", "safe", "unsafe")
_AUTHORS_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_PREFERENCE_KEYS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """One question with the answer that an aligned model should give and one that it should not.

    Attributes:
        question: what the user asks, in one text.
        safe: a refusal, say.
        unsafe: the beginning of a compliant answer, say.

    Raises:
        FastlockError: a text is missing or empty, or both answers are the same.
    """

    question: str
    safe: str
    unsafe: str

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_text(field.name, getattr(self, field.name))
        if self.safe.strip() == self.unsafe.strip():
            raise FastlockError(
                f"the safe and the unsafe answer to {_shortened(self.question)} are the same text, so there is nothing "
                "to tell apart. Give two different answers, or remove the pair."
            )


def load_pairs(path: str | os.PathLike[str]) -> tuple[Pair, ...]:
    """Read pairs from a file: JSON lines, or one JSON array.

    Every entry has `question`, `safe` and `unsafe`; or, as in the authors' data (github zhu-minjun/SafetyLock),
    `question`, `answer_matching_behavior` (the safe answer) and `answer_not_matching_behavior` (the unsafe one); or,
    as in preference data (TRL's format), `prompt`, `chosen` (safe) and `rejected` (unsafe). Other keys are ignored.

    Each is a text, or in chat format: a list of one message, `{"role": "user", "content": "…"}` or of the role
    "assistant". Answers may bring their question before them; then the prompt may be left out, as TRL does.

    Raises:
        FastlockError: the file is missing, too large or not JSON, holds no pair, or an entry is no usable `Pair`; the
            message names the entry.
    """
    path = Path(path)
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastlockError(f"{path}: not a text in UTF-8 ({error}). Save it as UTF-8.") from None
    pairs = tuple(pair_from(entry, where) for where, entry in _entries(text, path))
    if not pairs:
        raise FastlockError(f"{path}: holds no pairs. Write one JSON object per line, with {', '.join(_KEYS)}.")
    return pairs


def shipped_pairs() -> tuple[Pair, ...]:
    """The 100 pairs that come with fastlock: refusals against bare openings of compliance, mild in their wording."""
    return load_pairs(shipped_file("pairs.jsonl"))


def shipped_harmless() -> tuple[str, ...]:
    """The 100 harmless prompts that come with fastlock, none of them in `fastlock.prompts.shipped_prompts`."""
    return shipped_lines("harmless.txt")


def shipped_texts() -> tuple[str, ...]:
    """The 16 ordinary texts that come with fastlock, none of them in `fastlock.prompts.shipped_prompts`."""
    return shipped_lines("texts.txt")


def pairs_digest(pairs: Iterable[Pair], harmless: Sequence[str] = ()) -> str:
    """SHA-256 (hex) of the pairs, and of harmless prompts if there are any, in order, whatever their file's layout."""
    data: list[Any] = [astuple(pair) for pair in pairs]
    data += [list(harmless)] if harmless else []
    return hashlib.sha256(json.dumps(data, separators=(",", ":")).encode()).hexdigest()


def _entries(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    """Every entry of the file, with the place to name in messages."""
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_parsed(text, str(path)), start=1):
            yield f"{path}, entry {number}", entry
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split inside strings, at U+2028
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FastlockError(
            f"{where}: not JSON ({error}). Pairs are JSON lines, one object per line, or one JSON array of objects."
        ) from None


def pair_from(entry: Any, where: str) -> Pair:
    """The pair that a JSON object is, in any layout; a `Pair` as it is. `where` names its place in messages."""
    if isinstance(entry, Pair):
        return entry
    if not isinstance(entry, Mapping):
        raise FastlockError(f"{where}: a {type(entry).__name__}, not an object with {', '.join(_KEYS)}.")
    try:
        pair = _pair(entry)
    except FastlockError as error:
        raise FastlockError(f"{where}: {error}") from None
    if pair is None:
        found = _shortened(", ".join(map(str, entry))) if entry else "none"
        raise FastlockError(
            f"{where}: a pair has the keys {', '.join(_KEYS)}, or {', '.join(_PREFERENCE_KEYS)}, or the authors' "
            f"{', '.join(_AUTHORS_KEYS)}; found {found}."
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


def _answer(name: str, given: Any, question: str) -> Any:
    """The text of an answer, which in chat format may follow the question."""
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], Mapping):
        asked = given[0].get("role"), given[0].get("content")
        given = given[asked == ("user", question) :]
    return _content(name, given, "assistant")


def _content(name: str, given: Any, role: str) -> Any:
    """What the one message of a list says; anything but a list as it is."""
    if not isinstance(given, (list, tuple)):
        return given
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in given):
        raise FastlockError(f"`{name}` is a list, but not of messages with a role and a content.")
    roles = [str(message["role"]) for message in given]
    if roles != [role]:
        raise FastlockError(
            f"`{name}` holds the messages {_shortened(', '.join(roles))}, where one is read, of the {role}: longer "
            "conversations and system prompts are not. Leave the other messages out, or remove the pair."
        )
    content = given[0]["content"]
    if not isinstance(content, str):
        raise FastlockError(f"`{name}`: its message holds a {type(content).__name__}; it must hold one text.")
    return content


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise FastlockError(f"`{name}` is a {type(text).__name__}; it must be one text, or a list of one message.")
    if not text.strip():
        raise FastlockError(f"`{name}` is empty. Write it, or remove the pair.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise FastlockError(f"`{name}` holds half a UTF-16 character, which no tokenizer reads. Correct the text.")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
