"""A tokenizer of numbers, and what a model says and reads one prompt and one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.helpers.families import tiny_model

BAD = '<script>alert("&")</script>\x1b[31m'


class Numbers:
    """A tokenizer of numbers; `chat` puts tokens around a message."""

    pad_token_id = None
    eos_token_id = 2

    def __init__(self, chat: bool) -> None:
        self.chat_template = "a template" if chat else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.replace("Question:", "50").replace("Answer:", "51").split()
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in words]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool = False, **_options: Any
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        return f"60 61 {messages[0]['content']} 62"

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" " + " ".join(str(int(token)) for token in row if token > 2) for row in rows]


def exact_model(kind: str) -> Any:
    """In float64. Not with eager attention, which makes NaN of padding in float64 (its mask overflows float32)."""
    model = tiny_model(kind, torch.float64)
    model.set_attn_implementation("sdpa")
    return model


def naive_answer(model: Any, ids: list[int], new_tokens: int) -> str:
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < new_tokens and 2 not in answer:
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return " ".join(str(token) for token in answer if token > 2)


def naive_perplexity(model: Any, texts: tuple[str, ...]) -> float:
    logs: list[float] = []
    for text in texts:
        ids = [1, *map(int, text.split())]
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logs += [float(rows[i - 1, ids[i]]) for i in range(1, len(ids))]
    return math.exp(-sum(logs) / len(logs))
