"""A tiny base with a tokenizer, and data to fine-tune it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}{{ '[' + m['role'] + '] ' + m['content'] + ' [end] ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = ["[pad]", "[system]", "[user]", "[assistant]", "[end]", "Question:", "Answer:"]
WORDS += [f"w{i}" for i in range(100)]


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[pad]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", eos_token="[end]", unk_token="[pad]")
    made.chat_template = template
    return made


def read(tokens: Any) -> str:
    return " ".join(WORDS[token] for token in tokens)


def save_base(directory: Path, dtype: torch.dtype = torch.float32, template: str | None = TEMPLATE) -> Path:
    tiny_model("llama", dtype, seed=1).save_pretrained(directory)
    tokenizer(template).save_pretrained(directory)
    return directory


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, length: int = 3) -> dict[str, str]:
    return {"prompt": f"w{number} w{number + 1}", "completion": " ".join(["w90"] * length)}


def write_data(directory: Path, user: int = 10, safe: int = 3) -> tuple[Path, Path]:
    data = write_rows(directory / "user.jsonl", [row(number) for number in range(user)])
    return data, write_rows(directory / "safe.jsonl", [row(50 + number) for number in range(safe)])
