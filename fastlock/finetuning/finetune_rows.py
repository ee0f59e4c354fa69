"""Conversations to fine-tune on: from JSON lines to tokens, in the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlock.errors import DamagedError, FastlockError, is_unicode, shown
from fastlock.inference.chat import DATE, check_row
from fastlock.storage.files import parse_rows, read_bounded

MAX_FILE_BYTES = 4 * 1024**3
_LAYOUT = "Rows are JSON lines, one object per line, or one JSON array of objects."

_IGNORED = -100  # what torch's cross entropy leaves out

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages of which the last, the assistant's, is learned.

    Attributes:
        messages: each with a role (system, user, assistant) and a content.
        where: its place in a file, for messages.
    """

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a conversation.

    Attributes:
        tokens: all of them.
        prompt: how many of them come before what is learned.
    """

    tokens: tuple[int, ...]
    prompt: int


def load_conversations(path: Path) -> list[Conversation]:
    """Read JSON lines, or one JSON array; an entry has the keys of one line of `_FORMS`, others are ignored.

    Raises:
        DamagedError: it is not JSON, or an entry is not a conversation that can be learned; the message names it.
        FastlockError: the file cannot be read, or is empty.
    """
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: not a text in UTF-8 ({error}). Save it as UTF-8.") from None
    rows = parse_rows(text, str(path), _LAYOUT)
    conversations = [Conversation(_messages(entry, where), where) for where, entry in rows]
    if not conversations:
        raise FastlockError(f"{path}: it holds no rows. Write one JSON object per line, {_EXPECTED}.")
    return conversations


def _of_messages(entry: Mapping[str, Any]) -> list[Any]:
    return list(_listed(entry["messages"], "user"))


def _of_prompt(question: str, answer: str) -> Callable[[Mapping[str, Any]], list[Any]]:
    return lambda entry: [*_listed(entry[question], "user"), *_listed(entry[answer], "assistant")]


def _of_instruction(entry: Mapping[str, Any]) -> list[Any]:
    asked = [entry["instruction"], entry.get("input")]
    texts = [text for text in asked if not (isinstance(text, str) and not text.strip()) and text is not None]
    question = "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else texts
    return [*_listed(question, "user"), *_listed(entry["output"], "assistant")]


# The keys that an entry may have, and what makes messages of them.
_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], list[Any]]] = {
    ("messages",): _of_messages,
    ("prompt", "completion"): _of_prompt("prompt", "completion"),
    ("prompt", "response"): _of_prompt("prompt", "response"),
    ("question", "answer"): _of_prompt("question", "answer"),
    ("instruction", "output"): _of_instruction,
}
_EXPECTED = "with " + ", or ".join(" and ".join(keys) for keys in _FORMS)


def _listed(value: Any, role: str) -> Sequence[Any]:
    """A text as one message of a role; a list of messages as it is."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _messages(entry: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(entry, Mapping):
        raise DamagedError(f"{where}: it is of type {type(entry).__name__}; it must be an object {_EXPECTED}.")
    form = next((form for form in _FORMS if all(key in entry for key in form)), None)
    if form is None:
        keys = shown(", ".join(map(str, entry)))[:80] or "none"
        only = " It has one side only." if any(key in entry for keys in _FORMS for key in keys) else ""
        raise DamagedError(f"{where}: its keys are {keys}; they must be those of a row {_EXPECTED}.{only}")
    messages = _FORMS[form](entry)
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DamagedError(f"{where}: a message must be an object with a role and a content.")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise DamagedError(f"{where}: the role and the content of a message must be texts.")
        if not is_unicode(message["content"]):
            raise DamagedError(f"{where}: half a character (a lone surrogate), which no tokenizer reads. Correct it.")
    roles = [message["role"] for message in messages]
    for role, side in (("user", "a question"), ("assistant", "an answer")):
        if not any(message["role"] == role and message["content"].strip() for message in messages):
            raise DamagedError(f"{where}: it has one side only: {side} is missing, or empty. Write it, or remove it.")
    if roles[-1] != "assistant" or not messages[-1]["content"].strip():
        raise DamagedError(f"{where}: its last message must be the assistant's, which is learned, and is not.")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def token_rows(
    model: nn.Module, tokenizer: Any, conversations: Sequence[Conversation], max_length: int
) -> tuple[list[TokenRow], int]:
    """The tokens of conversations, and how many answers were cut at `max_length`.

    A prompt is what the chat template puts before an answer, and is not learned. Without a chat template it is
    "Question: … Answer:", and the answer ends with the tokenizer's end token.

    Raises:
        FastlockError: the chat template fails or does not put the answer last, a row has tokens that the model does
            not know, or its prompt leaves no room for an answer.
    """
    rows, cut = [], 0
    for conversation in conversations:
        prompt, answer = _token_ids(tokenizer, conversation)
        if len(prompt) >= max_length:
            raise FastlockError(
                f"{conversation.where}: what comes before its answer makes {len(prompt)} tokens, and a row may have "
                f"{max_length}. Shorten it, or give a larger --max-length."
            )
        cut += len(prompt) + len(answer) > max_length
        tokens = (prompt + answer)[:max_length]
        check_row(model, tokens, conversation.where)
        rows.append(TokenRow(tuple(tokens), len(prompt)))
    return rows, cut


def _token_ids(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """The tokens before the answer, and those of the answer with what ends it."""
    if getattr(tokenizer, "chat_template", None):
        prompt, whole = _templated(tokenizer, conversation)
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, whole[len(prompt) :])]
        return ids[0], ids[1]
    earlier = "".join(f"{_TITLES.get(m['role'], m['role'])}: {m['content']}\n" for m in conversation.messages[:-1])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = list(tokenizer(f"{earlier}Answer:")["input_ids"])
    before = before[:-1] if before[-1:] == end and end else before
    answer = tokenizer(f" {conversation.messages[-1]['content'].strip()}", add_special_tokens=False)["input_ids"]
    return before, [*answer, *end]


_TITLES = {"user": "Question", "assistant": "Answer", "system": "System"}


def _templated(tokenizer: Any, conversation: Conversation) -> tuple[str, str]:
    """The prompt, and the whole conversation, which begins with it."""
    messages = list(conversation.messages)
    try:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=False, date_string=DATE
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    except Exception as error:  # templates raise whatever they like
        raise FastlockError(
            f"{conversation.where}: the chat template fails on it ({type(error).__name__}: {error}). Check its roles "
            "and their order, or correct the tokenizer's chat_template."
        ) from None
    if not whole.startswith(prompt):
        raise FastlockError(
            f"{conversation.where}: with its answer, the chat template does not begin as it does without, so nobody "
            "can tell what is to be learned. Correct the tokenizer's chat_template."
        )
    if not whole[len(prompt) :].strip():
        raise FastlockError(f"{conversation.where}: the chat template leaves its answer out. Correct it.")
    return prompt, whole


def padded(rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """A batch for a model: tokens padded on the right, where they are not attended to, and labels of the answers.

    Returns:
        input_ids, attention_mask and labels, each int64 [len(rows), longest row].
    """
    width = max(len(row.tokens) for row in rows)
    gaps = [[0] * (width - len(row.tokens)) for row in rows]
    labels = [
        [_IGNORED] * row.prompt + list(row.tokens[row.prompt :]) + [_IGNORED] * len(gap)
        for row, gap in zip(rows, gaps, strict=True)
    ]
    return {
        "input_ids": torch.tensor([[*row.tokens, *gap] for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(row.tokens) + gap for row, gap in zip(rows, gaps, strict=True)]),
        "labels": torch.tensor(labels),
    }
