"""What the tokenizers in directories make of some texts, by the transformers that runs this: read_tokenizers.py DIR...

Prints the class, the tokens with and without special ones, padded, and the way back, as JSON by directory; or what went
wrong.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from transformers import AutoTokenizer

TEXTS = (
    "<s> [INST] Say it.\n\nIn 2024 [/INST] Sure.</s> [INST] More [/INST]",
    "a",
    " a leading space,  two of them, and Ümläute: don't",
    "<|endoftext|>",
)


def read(directory: str) -> dict[str, Any]:
    """Load a tokenizer, and let it read the texts."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    found = {
        "class": type(tokenizer).__name__,
        "tokens": tokens,
        "with special tokens": [tokenizer(text)["input_ids"] for text in TEXTS],
        "a pair": tokenizer(TEXTS[0], TEXTS[1])["input_ids"],
        "the way back": [tokenizer.decode(ids) for ids in tokens],
        "special tokens": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token],
    }
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or "a"
    return found | {"padded": dict(tokenizer(list(TEXTS), padding=True))}


def main() -> None:
    """Read all of them."""
    found: dict[str, Any] = {}
    for directory in sys.argv[1:]:
        try:
            found[directory] = read(directory)
        except Exception as error:  # transformers raises whatever its parts raise
            found[directory] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
