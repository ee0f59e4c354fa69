"""A tiny Llama in which a few known layers refuse, and no others: what `locate` must find.

Every token has a constant; words may be malicious or normal, more or less. Attention looks at all tokens alike. The
layers of the band carry what is malicious to the direction of refusal; the others do not, and scaling them calms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastlock.finetuning.band_prompts import BandPrompts

LAYERS, FIRST, LAST = 9, 3, 5
HIDDEN, WORDS = 32, 100
# Dimensions of the hidden state.
CONSTANT, MALICIOUS, REFUSAL, NOISE = 0, 1, 2, slice(8, 32)
SORRY, SURE, END, START = 103, 104, 105, 106


class Planted:
    """One token a word: "m37" is malicious to 37 %, "n37" normal, "f3" neither."""

    chat_template: str | None = None
    pad_token_id = eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        known = [word for word in text.split() if word[:1] in "mnf" and word[1:].isdigit()]
        return {"input_ids": [START, *(self.token(word) for word in known), START]}

    def token(self, word: str) -> int:
        number = int(word[1:])
        return {"m": 0, "n": 40, "f": 80}[word[0]] + number

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join("sorry" if token == SORRY else "sure" for token in row) for row in rows]


def refused(_prompt: str, answer: str) -> bool:
    return answer.startswith("sorry")


def planted_model(dtype: torch.dtype = torch.float32, first: int = FIRST, last: int = LAST, least: float = 0.3) -> Any:
    """The model; `least` is how much malice it answers."""
    config = LlamaConfig(
        vocab_size=112,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=END,
        bos_token_id=START,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if parameter.dim() > 1 else parameter.fill_(1)
        embedding = model.model.embed_tokens.weight
        embedding[:, CONSTANT] = 1
        embedding[:SORRY, NOISE] = 0.3 * torch.randn(SORRY, HIDDEN - 8, generator=generator)
        embedding[:40, MALICIOUS] = torch.arange(40) / 40
        embedding[40:80, MALICIOUS] = -torch.arange(40) / 40
        for number, layer in enumerate(model.model.layers):
            _plant(layer.self_attn, first <= number <= last, generator)
        model.lm_head.weight[SORRY, REFUSAL] = 1
        model.lm_head.weight[SURE, CONSTANT] = least
    return model.to(dtype).eval()


def _plant(attention: nn.Module, in_band: bool, generator: torch.Generator) -> None:
    values, output = attention.v_proj.weight, attention.o_proj.weight
    values[CONSTANT, CONSTANT] = values[MALICIOUS, MALICIOUS] = 1
    values[NOISE, NOISE] = 0.1 * torch.randn(HIDDEN - 8, HIDDEN - 8, generator=generator)
    output[NOISE, NOISE] = 0.1 * torch.randn(HIDDEN - 8, HIDDEN - 8, generator=generator)
    if in_band:
        output[REFUSAL, MALICIOUS] = 1.5
    else:
        output[REFUSAL, CONSTANT] = -0.05


def planted_prompts(count: int = 40, borderline: int = 39) -> BandPrompts:
    """Requests of six words: neither kind of word is more common in one kind of request than noise makes it."""
    generator = torch.Generator().manual_seed(3)

    def request(word: str) -> str:
        fillers = [f"f{int(number)}" for number in torch.randint(0, 20, (5,), generator=generator)]
        place = int(torch.randint(0, 6, (1,), generator=generator))
        return " ".join([*fillers[:place], word, *fillers[place:]])

    strong = torch.randint(30, 40, (2, count), generator=generator).tolist()
    return BandPrompts(
        tuple({request(f"n{number}") for number in strong[0]}),
        tuple({request(f"m{number}") for number in strong[1]}),
        tuple({request(f"m{1 + number % 39}") for number in range(borderline)}),
    )
