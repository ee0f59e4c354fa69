"""Pairs, shipped, in files of every layout, and in memory."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastlock
from fastlock import FastlockError
from fastlock.evaluation.prompts import shipped_prompts
from fastlock.recipes.extraction import extract
from fastlock.recipes.pairs import Pair, load_pairs, shipped_harmless, shipped_pairs
from tests.helpers.families import tiny_model
from tests.helpers.words import PAIRS, Words

AUTHORS_KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def lines(keys: tuple[str, ...] = ("question", "safe", "unsafe")) -> list[str]:
    return [json.dumps(dict(zip(keys, (p.question, p.safe, p.unsafe), strict=True))) for p in PAIRS]


@pytest.mark.parametrize("keys", [("question", "safe", "unsafe"), AUTHORS_KEYS])
def test_every_layout_gives_the_same_pairs(tmp_path: Path, keys: tuple[str, ...]) -> None:
    entries = [json.loads(line) | {"id": 1} for line in lines(keys)]
    for text in (
        "\n".join(lines(keys)),
        "\ufeff" + "\r\n\r\n".join(lines(keys)) + "\r\n",
        " \n" + json.dumps(entries, indent=4),
    ):
        assert load_pairs(write(tmp_path / "pairs", text)) == tuple(PAIRS)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content, "name": ""}


def layouts(pair: Pair) -> dict[str, dict[str, Any]]:
    """The pair in every layout, texts and messages."""
    question, safe, unsafe = pair.question, pair.safe, pair.unsafe
    asked, good, bad = [message("user", question)], [message("assistant", safe)], [message("assistant", unsafe)]
    return {
        "texts": {"question": question, "safe": safe, "unsafe": unsafe},
        "authors": dict(zip(AUTHORS_KEYS, (question, safe, unsafe), strict=True)),
        "messages": {"question": asked, "safe": good, "unsafe": bad},
        "a message and texts": {"question": asked, "safe": safe, "unsafe": unsafe},
        "preferences": {"prompt": question, "chosen": safe, "rejected": unsafe},
        "preferences in messages": {"prompt": asked, "chosen": good, "rejected": bad},
        "conversations": {"prompt": question, "chosen": asked + good, "rejected": asked + bad, "score": 1.0},
        "implicit prompt": {"chosen": asked + good, "rejected": asked + bad},
    }


class Dataset:
    """What `datasets.Dataset` is to one who loops over it: rows, as often as one likes."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.parametrize("layout", layouts(PAIRS[0]))
def test_every_layout_and_any_iterable_give_the_same_pairs(tmp_path: Path, layout: str) -> None:
    rows = [layouts(pair)[layout] for pair in PAIRS]
    assert load_pairs(write(tmp_path / "pairs", "\n".join(map(json.dumps, rows)))) == tuple(PAIRS)
    expected = extract(tiny_model("llama"), Words(), PAIRS, heads=3)
    for given in (Dataset(rows), (types.MappingProxyType(row) for row in rows)):
        lock = extract(tiny_model("llama"), Words(), given, heads=3)
        assert (lock.digest, lock.extraction_digest) == (expected.digest, expected.extraction_digest)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"prompt": []}, "`prompt` holds the messages ''"),
        (
            {"prompt": [message("system", "be good"), message("user", "q")]},
            "`prompt` holds the messages 'system, user'",
        ),
        ({"prompt": [message("assistant", "q")]}, "it must be one message, of the user"),
        (
            {"chosen": [message("user", "no")]},
            "`chosen` holds the messages 'user'; it must be one message, of the assistant",
        ),
        ({"chosen": [message("user", "other"), message("assistant", "no")]}, "`chosen` holds the messages 'user, assi"),
        ({"rejected": [message("assistant", "a")] * 2}, "`rejected` holds the messages 'assistant, assistant'"),
        ({"rejected": ["yes"]}, "`rejected` is a list, but not of messages"),
        ({"rejected": [{"role": "assistant"}]}, "`rejected` is a list, but not of messages"),
        ({"rejected": [{"role": "assistant", "content": [{"type": "text"}]}]}, "`rejected`: its message holds a list"),
        ({"rejected": [message("assistant", " ")]}, "`unsafe` is empty"),
        ({"chosen": "", "prompt": "q"}, "`safe` is empty"),
        ({"chosen": [message("assistant", "yes")], "rejected": "yes"}, "the safe and the unsafe answer to 'q' are the"),
        ({"prompt": None, "chosen": "a"}, "`question` is of type NoneType"),
    ],
)
def test_conversations_that_are_no_pair_are_refused(changes: dict[str, Any], found: str) -> None:
    entry = {"prompt": "q", "chosen": "no", "rejected": "yes"} | changes
    with pytest.raises(FastlockError, match=f"pair 2: .*{found}"):
        extract(tiny_model("llama"), Words(), [PAIRS[0], entry], heads=3)


@pytest.mark.parametrize(
    "entry",
    [
        {"chosen": [], "rejected": []},
        {"chosen": [message("user", "q"), message("assistant", "a")], "rejected": [message("assistant", "b")] * 2},
        {"chosen": [message("user", "q"), message("assistant", "a")], "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
    ],
)
def test_preferences_without_a_prompt_need_the_same_question(entry: dict[str, Any]) -> None:
    with pytest.raises(FastlockError, match="pair 1: .*(holds the messages|a pair has the keys)"):
        extract(tiny_model("llama"), Words(), [entry, PAIRS[0]], heads=3)


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    line = json.dumps({"question": "one\u2028two", "safe": "no", "unsafe": "yes"}, ensure_ascii=False)
    assert load_pairs(write(tmp_path / "pairs", line))[0].question == "one\u2028two"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no pairs"),
        ("[]", "no pairs"),
        ("{}", r"line 1: a pair has the keys question, safe, unsafe, or .*; this one has none"),
        (lines()[0] + '\n\n{"question": "q", "safe": "s"}', "line 3: a pair has the keys"),
        (lines()[0] + "\nquestion,safe", "line 2: not JSON"),
        ("[" + lines()[0] + ', {"question": 1}]', "entry 2: a pair has the keys"),
        ("[" + lines()[0] + ", 7]", "entry 2: it is of type int"),
        ("[1, 2", "not JSON"),
        ("7", "line 1: it is of type int"),
        ('{"question": ["q"], "safe": "s", "unsafe": "u"}', "line 1: `question` is a list"),
        ('{"question": "q", "safe": " ", "unsafe": "u"}', "line 1: `safe` is empty"),
        ('{"question": "", "safe": "s", "unsafe": "u"}', "line 1: `question` is empty"),
        ('{"question": "q", "safe": "s", "unsafe": null}', "line 1: `unsafe` is of type NoneType"),
        (
            '{"question": "q", "safe": "s", "unsafe": "s "}',
            "line 1: the safe and the unsafe answer to 'q' are the same",
        ),
        ('{"question": "q", "safe": "s", "unsafe": "\\ud800"}', "line 1: `unsafe` holds half a character"),
        ("[" * 200_000, "not JSON"),
        ('{"a":' * 200_000, "line 1: not JSON"),
        ("9" * 10_000, "line 1: not JSON"),
    ],
)
def test_bad_files_are_refused_by_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(fastlock.DamagedError, match=message):
        load_pairs(write(tmp_path / "pairs", text))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastlockError, match="does not exist"):
        load_pairs(tmp_path / "nothing")
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(fastlock.DamagedError, match="UTF-8"):
        load_pairs(tmp_path / "latin")
    monkeypatch.setattr("fastlock.recipes.pairs.MAX_FILE_BYTES", 8)
    with pytest.raises(FastlockError, match="larger than"):
        load_pairs(tmp_path / "latin")


def test_a_pair_given_twice_counts_once() -> None:
    once, twice = (extract(tiny_model("llama"), Words(), pairs, heads=3) for pairs in (PAIRS, PAIRS + PAIRS[:2]))
    assert once.digest == twice.digest
    assert once.extraction_digest == twice.extraction_digest


def test_dictionaries_are_pairs_too() -> None:
    model = tiny_model("llama")
    ours = [{"question": p.question, "safe": p.safe, "unsafe": p.unsafe} for p in PAIRS]
    theirs = [
        {"question": p.question, "answer_matching_behavior": p.safe, "answer_not_matching_behavior": p.unsafe}
        for p in PAIRS
    ]
    assert extract(model, Words(), ours, heads=2) == extract(model, Words(), theirs, heads=2)
    assert extract(model, Words(), ours, heads=2) == extract(model, Words(), PAIRS, heads=2)


def test_the_shipped_pairs() -> None:
    pairs = shipped_pairs()
    assert len(set(pairs)) == len(pairs) == 100
    for texts in ([p.question for p in pairs], [p.safe for p in pairs], [p.unsafe for p in pairs]):
        assert len(set(texts)) == 100
    # At least five words, so at least five tokens; and short, so that extraction is quick.
    assert all(5 <= len(text.split()) <= 25 for pair in pairs for text in (pair.safe, pair.unsafe))


def test_the_shipped_harmless_prompts_are_not_those_that_are_evaluated() -> None:
    harmless, asked = shipped_harmless(), shipped_prompts()
    assert len(set(harmless)) == len(harmless) == 100
    assert not {text.lower() for text in harmless} & {text.lower() for text in (*asked.harmful, *asked.harmless)}
    assert not {pair.question.lower() for pair in shipped_pairs()} & {text.lower() for text in asked.harmful}
