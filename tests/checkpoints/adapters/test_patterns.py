"""Whose key of a pattern holds for a module, as PEFT decides it."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from fastlock.checkpoints.adapters.methods.patterns import value_for
from fastlock.errors import DamagedError, UnsupportedError

PATH = "model.layers.12.self_attn.o_proj"
KEYS = (
    "o_proj",
    "_proj",
    "proj",
    "self_attn.o_proj",
    "self_attn_o_proj",
    "attn.o_proj",
    PATH,
    f"base.{PATH}",
    f"^{PATH}",
    "layers.12.self_attn.o_proj",
    "layers.2.self_attn.o_proj",
    r"layers\.1[0-9]\.self_attn\.o_proj",
    r"layers\.[0-9]\..*",
    "o_proj|q_proj",
    "o_pro.",
    "o.proj",
    "",
    ".",
    "model",
    "(o|q)_proj",
    r"layers\.(0|1|2|3|4|5|6|7|8|9|10|11|12)\..*o_proj",
    r"(?:.*\.)12\.(?!mlp).*",
    "o_proj$",
    "..proj",
)


@pytest.mark.parametrize("key", KEYS)
def test_matches_what_peft_matches(key: str) -> None:
    expected = get_pattern_key([key], PATH) == key
    assert value_for({key: 3}, PATH, 8, "rank_pattern", "here") == (3 if expected else 8)


def test_takes_the_first_key_that_matches() -> None:
    assert value_for({"q_proj": 1, "o_proj": 2, PATH: 3}, PATH, 8, "rank_pattern", "here") == 2
    assert value_for(None, PATH, 8, "rank_pattern", "here") == 8


@pytest.mark.parametrize(
    "key",
    [
        *("(a+)+", "(.*)*", "(a|a)*b", ".*.*.*x", "a?" * 60 + "a" * 60, "(a|a)" * 60, "x" * 300 + "*"),
        *(".*.*" + "(a|.)" * 12 + "x", "(?x:(?:a+) +x)", "(?:a+)(?#)+x"),
    ],
)
def test_refuses_what_could_match_for_ever(key: str) -> None:
    with pytest.raises(UnsupportedError, match="too intricate"):
        value_for({key: 3}, "a" * 200, 8, "rank_pattern", "here")


@pytest.mark.parametrize("key", ["x{}", "x{}.*"])
def test_refuses_more_keys_than_a_model_has_modules(key: str) -> None:
    with pytest.raises(UnsupportedError, match="too intricate"):
        value_for({key.format(i): 3 for i in range(2**17)}, PATH, 8, "rank_pattern", "here")
    assert value_for({key.format(i): 3 for i in range(1000)}, PATH, 8, "rank_pattern", "here") == 8


def test_refuses_what_is_no_pattern() -> None:
    with pytest.raises(DamagedError, match="no regular expression"):
        value_for({"o_proj[": 3}, PATH, 8, "rank_pattern", "here")
    with pytest.raises(DamagedError, match="not a JSON object"):
        value_for(["o_proj"], PATH, 8, "rank_pattern", "here")
