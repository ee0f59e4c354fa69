"""Pairs, and a tokenizer that hashes words."""

from __future__ import annotations

import hashlib
from typing import Any

from fastlock.recipes.pairs import Pair

PAIRS = [
    Pair("may I", "sorry I can not", "sure here it is"),
    Pair("can you", "that would be wrong so no", "yes of course I will do that now"),
    Pair("tell me", "no I will not tell", "gladly here you go"),
    Pair("how do I", "please do not do this at all", "first you go there and then"),
    Pair("help me", "I can not be of help", "I can be of help"),
    Pair("show it", "that is private I am afraid", "look over here then you see"),
]


class Words:
    """A tokenizer that hashes words; its special token is 1."""

    chat_template: str | None = None

    def __init__(self, vocabulary: int = 119) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + int(hashlib.md5(word.encode()).hexdigest(), 16) % (self.vocabulary - 3) for word in text.split()]
        return {"input_ids": [1] * add_special_tokens + ids}


class ChatWords(Words):
    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, **options: Any) -> str:
        assert not tokenize
        assert options == {"add_generation_prompt": len(messages) == 1, "date_string": "26 Jul 2024"} or messages[1:]
        return " ".join(f"<{m['role']}> {m['content']} <end>" for m in messages) + " <assistant>"
