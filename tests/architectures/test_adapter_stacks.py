"""What is known of stacks and adapters: the page for people says the same, and a refusal names its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastlock.architectures.adapter_stacks import ADAPTER_STACKS, why_refused
from fastlock.architectures.serving_stacks import STACKS

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"

SCALES = {"peft": "PEFT's", "sglang": "α/r of the config", "llama.cpp": "α of the config / rank"}


def test_every_stack_is_known() -> None:
    assert tuple(ADAPTER_STACKS) == STACKS


def test_the_page_has_the_same_table() -> None:
    rows = dict(re.findall(r"^\| (transformers|vllm|sglang|llama\.cpp) \|(.*)\|$", PAGE.read_text(), re.MULTILINE))
    assert tuple(rows) == STACKS
    for name, row in rows.items():
        own, _, scale, refuses = (cell.strip() for cell in row.split("|"))
        stack = ADAPTER_STACKS[name]
        assert own == ("yes" if stack.adapter_bias else "no")
        assert scale == SCALES[stack.scaling]
        assert set(re.findall(r"`(\w+)`", refuses)) == set(stack.refuses)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": False, "bias": "none", "modules_to_save": None, "init_lora_weights": "EVA"}, None),
        ({"modules_to_save": ["score"], "init_lora_weights": True}, None),
    ],
    ids=str,
)
def test_vllm_refuses_by_the_key(config: dict, key: str | None) -> None:
    reason = why_refused("vllm", "LORA", config)
    assert (reason is None) == (key is None)
    assert key is None or f"with {key} = " in str(reason)
    assert why_refused("transformers", "LORA", config) is None
    assert why_refused("vllm", "IA3", {}) == "vllm loads no adapters of the method 'IA3'"
