"""What several files of this room need."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import random_lock, tiny_model
from tests.helpers.reading import BAD


@pytest.fixture
def directory(tmp_path):
    """A tiny model with a real tokenizer, a lock, and prompts."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    words = {f"w{number}": number for number in range(120)} | {"<unk>": 120}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "model")
    random_lock(model).save(tmp_path / "lock.safetensors")
    (tmp_path / "harmful.json").write_text(json.dumps(["w5 w6", f"w7 {BAD}"]))
    (tmp_path / "harmless.txt").write_text("w8 w9 w10\n")
    (tmp_path / "texts.txt").write_text("w11 w12 w13 w14\n")
    return tmp_path
