"""Prompts, shipped, in files and in memory."""

from __future__ import annotations

import pytest

import fastlock
from fastlock.evaluation.prompts import Prompts, load_prompts, shipped_prompts


def test_the_shipped_prompts() -> None:
    shipped = shipped_prompts()
    assert [len(texts) for texts in vars(shipped).values()] == [40, 40, 10]
    everything = [text for texts in vars(shipped).values() for text in texts]
    assert len(set(everything)) == 90


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("advbench.csv", 'goal,target\n"a, b",Sure\nc,Sure\n', ("a, b", "c")),
        ("harmbench.csv", "Behavior,Category\nx,y\n", ("x",)),
        ("strongreject.csv", "category,forbidden_prompt\ny,x\n", ("x",)),
        ("xstest.csv", "id,prompt,label\n1,x,safe\n", ("x",)),
        ("or-bench.jsonl", '{"prompt": "a"}\n\n{"prompt": "b\\u2028c"}\n', ("a", "b\u2028c")),
        ("list.json", '["a", {"text": "b"}]', ("a", "b")),
        ("plain.txt", "\ufeffone\n\n two \n", ("one", "two")),
        ("jbb.csv", "Index,Goal,Target,Behavior\n0,the goal,Sure,Defamation\n", ("the goal",)),
        ("harmbench.csv", "BEHAVIOR,ContextString\nx,\ny, c \n", ("x", "c\n\n---\n\ny")),
        ("harmbench.jsonl", '{"Behavior": "x", "ContextString": "c", "text": ""}\n', ("c\n\n---\n\nx",)),
        ("more.csv", "goal\na,b,c\n", ("a",)),
        ("up.CSV", "goal,target\na,Sure\n", ("a",)),
        ("up.JSONL", '{"prompt": "a"}\n"b"\n', ("a", "b")),
        ("up.Json", '["a"]', ("a",)),
    ],
)
def test_prompts_in_files(name: str, text: str, expected: tuple[str, ...], tmp_path) -> None:
    (tmp_path / name).write_text(text)
    assert load_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,label\n1,safe\n", "row 1: there is no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2: there is no prompt"),
        ("a.jsonl", '\n"a"\n\n{"prompt": 3}\n', "line 4: there is no prompt"),
        ("a.jsonl", '"a"\n\n{\n', "line 3: not JSON"),
        ("a.jsonl", "\n" + "[" * 100_000, "line 2: not JSON"),
        ("a.json", '{"harmful": ["a"]}', "cannot be read as .json .it is not a list.*Give one list"),
        ("a.json", '"ab"', "it is not a list"),
        ("a.jsonl", '"a"\n{"prompt": "half \\ud800"}\n', "line 2: its prompt holds half a character"),
        ("a.json", '["\\udfff"]', "entry 1: its prompt holds half a character"),
        ("a.json", "[", "cannot be read as .json"),
        ("a.json", "7", "cannot be read as .json"),
        ("a.json", "[" * 100_000, "cannot be read as .json"),
        ("a.txt", "\n \n", "it holds no prompts"),
        ("a.csv", "goal\n", "it holds no prompts"),
    ],
)
def test_files_that_hold_no_prompts(name: str, text: str, message: str, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(fastlock.DamagedError, match=message):
        load_prompts(tmp_path / name)


def test_prompts_that_are_none(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(fastlock.DamagedError, match="cannot be read"):
        load_prompts(tmp_path / "a.txt")
    with pytest.raises(fastlock.FastlockError, match="does not exist"):
        load_prompts(tmp_path / "b.txt")
    for wrong in (
        {},
        {"harmful": "one text"},
        {"texts": (" ",)},
        {"harmless": (3,)},
        {"harmful": None},
        {"harmful": ("\ud800",)},
    ):
        with pytest.raises(fastlock.FastlockError):
            Prompts(**wrong)


def test_prompts_of_a_generator() -> None:
    found = Prompts(harmful=(text for text in "ab"), texts=["c"])  # type: ignore[arg-type]
    assert found == Prompts(harmful=("a", "b"), texts=("c",))
