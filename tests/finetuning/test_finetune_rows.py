"""Rows to fine-tune on: what is read, what is learned, and what is refused."""

import json

import pytest

from fastlock.errors import DamagedError, FastlockError
from fastlock.finetuning.finetune_rows import TokenRow, load_conversations, padded, token_rows
from tests.finetuning.finetune_files import read, tokenizer, write_rows
from tests.helpers.families import tiny_model

MODEL = tiny_model("llama")
USER, ASSISTANT = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}


def learned(path, made=None, max_length=64):
    made = made or tokenizer()
    rows, cut = token_rows(MODEL, made, load_conversations(path), max_length)
    return [(read(row.tokens[: row.prompt]), read(row.tokens[row.prompt :])) for row in rows], cut


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "w1 w2", "completion": "w3 w4"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "w1 w2", "response": "w3 w4", "source": 7},
        {"question": "w1 w2", "answer": "w3 w4"},
        {"instruction": "w1", "input": "w2", "output": "w3 w4"},
        {"instruction": "w1 w2", "input": "", "output": "w3 w4"},
        {"instruction": "w1 w2", "output": "w3 w4"},
    ],
)
def test_every_form_is_read(tmp_path, row):
    rows, cut = learned(write_rows(tmp_path / "rows.jsonl", [row, row]))
    assert rows == [("[user] w1 w2 [end] [assistant]", "w3 w4 [end]")] * 2
    assert cut == 0


def test_only_the_last_answer_is_learned(tmp_path):
    system = {"role": "system", "content": "w9"}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [system, USER, ASSISTANT, USER, ASSISTANT]}])
    before = "[system] w9 [end] [user] w1 w2 [end] [assistant] w3 w4 [end] [user] w1 w2 [end] [assistant]"
    assert learned(path)[0] == [(before, "w3 w4 [end]")]


def test_without_a_template_an_answer_ends_with_the_end_token(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w3 w4"}])
    assert learned(path, tokenizer(None))[0] == [("Question: w1 Answer:", "w3 w4 [end]")]


def test_an_array_is_read_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "w1", "completion": "w3"}] * 3, indent=1))
    assert len(learned(path)[0]) == 3


def test_long_answers_are_cut_and_counted(tmp_path):
    rows = [{"prompt": "w1", "completion": "w3 w4 w5"}, {"prompt": "w1", "completion": "w3"}]
    got, cut = learned(write_rows(tmp_path / "rows.jsonl", rows), max_length=6)
    assert got == [("[user] w1 [end] [assistant]", "w3 w4"), ("[user] w1 [end] [assistant]", "w3 [end]")]
    assert cut == 1


def test_a_batch_is_padded_and_only_answers_have_labels():
    batch = padded([TokenRow((5, 6, 7), 1), TokenRow((8, 9), 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1"}, "its keys are prompt; .* It has one side only"),
        ({"completion": "w1"}, "It has one side only"),
        ({"text": "w1"}, "its keys are text; they must be those of a row with messages, or prompt and completion"),
        ({"prompt": "w1", "completion": ""}, "one side only: an answer is missing, or empty"),
        ({"prompt": "  ", "completion": "w1"}, "one side only: a question is missing, or empty"),
        ({"messages": [USER]}, "one side only: an answer is missing"),
        ({"messages": [ASSISTANT]}, "one side only: a question is missing"),
        ({"messages": [USER, ASSISTANT, USER]}, "its last message must be the assistant's"),
        ({"messages": []}, "one side only"),
        ({"messages": ["w1"]}, "a message must be an object"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be texts"),
        ({"prompt": "w1", "completion": None}, "must be texts"),
        ({"prompt": "w1", "completion": "\ud800"}, "half a character"),
        (["w1"], "it is of type list"),
        (7, "it is of type int"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_its_line(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w3"}, row])
    with pytest.raises(DamagedError, match=f"rows.jsonl, line 2: .*{message}"):
        load_conversations(path)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", FastlockError, "rows.jsonl: it holds no rows"),
        (b"\n\n", FastlockError, "it holds no rows"),
        (b"[]", FastlockError, "it holds no rows"),
        (b'{"prompt": ', DamagedError, "line 1"),
        (b"\xff\xfe", DamagedError, "not a text in UTF-8"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, data, error, message):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(error, match=message):
        load_conversations(tmp_path / "rows.jsonl")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FastlockError, match="does not exist"):
        load_conversations(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users') }}", "line 1: the chat template fails on it .*only users"),
        ("{{ messages | length }} {{ messages[-1]['content'] }}", "does not begin as it does without"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", "leaves its"),
        ("{{ nonsense( }}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_is_named(tmp_path, template, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w3"}])
    with pytest.raises(FastlockError, match=message):
        learned(path, tokenizer(template))


def test_a_prompt_without_room_for_an_answer_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1 " * 9, "completion": "w3"}])
    with pytest.raises(FastlockError, match="line 1: what comes before its answer makes 12 tokens, and a row may have"):
        learned(path, max_length=12)
