"""Prompts to tokens, and rows that a model cannot read."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from fastlock import FastlockError
from fastlock.inference.chat import check_row, prompt_tokens
from tests.helpers.families import tiny_model, word_tokenizer
from tests.helpers.words import PAIRS, Words


def real_tokenizer(template: str) -> Any:
    words = word_tokenizer(PAIRS)
    words.chat_template = template
    return words


def test_a_lock_does_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ date_string }} {{ messages[0]['content'] }}"
    )
    digests = set()
    for day in (24, 25):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, *_: Any, day: int = day) -> Any:
                return datetime.datetime(2026, 11, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        words = real_tokenizer(template)
        assert str(day) in words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        digests.add(prompt_tokens(words, "x y")[0][0])
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("between", "space"),
    [(" ", " "), ("", ""), ("{{ '\\n\\n' }}", "\n\n"), ("<think></think>", ""), ("{{ raise() }}", "")],
)
def test_what_a_template_puts_before_an_answer(between: str, space: str) -> None:
    """Its words are tokenized as the model reads them; what is no space is for the model to say."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }} bot:{% else %}"
        + between
        + "{{ m['content'] }} end{% endif %}{% endfor %}"
    )
    assert prompt_tokens(real_tokenizer(template), "answer me")[1] == space


def test_a_prompt_does_not_end_in_the_end_of_all_text() -> None:
    class Ending(Words):
        eos_token_id = 2

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": super().__call__(text, add_special_tokens)["input_ids"] + [2] * add_special_tokens}

    assert prompt_tokens(Ending(), "may I") == prompt_tokens(Words(), "may I")


@pytest.mark.parametrize(
    ("row", "new_tokens", "message"),
    [
        ([], 0, "the text: the tokenizer makes no tokens of it. Remove it."),
        ([5, 128], 0, "the text: the tokenizer gives token 128, but GPT2LMHeadModel has 128"),
        ([5, -1], 0, "the text: the tokenizer gives token 5, but"),
        ([5] * 65, 0, "the text: it makes 65 tokens, but GPT2LMHeadModel reads at most 64. Shorten or remove it."),
        ([5] * 60, 5, r"60 tokens, and its answer may take 5 more, but .* or ask for shorter answers \(--new-tokens\)"),
    ],
)
def test_rows_that_a_model_cannot_read(row: list[int], new_tokens: int, message: str) -> None:
    model = tiny_model("gpt2")
    check_row(model, [0, 127], "the text")
    check_row(model, [5] * 64, "the text")
    check_row(model, [5] * 60, "the text", 4)
    with pytest.raises(FastlockError, match=message):
        check_row(model, row, "the text", new_tokens)
