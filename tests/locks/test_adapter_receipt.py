"""The receipt of an adapter: the same data both ways, and nothing else is taken for one."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fastlock
from fastlock.locks.adapter_receipt import AdapterBase, AdapterReceipt, AdapterSite

DIGEST = "0123456789abcdef" * 4


def receipt(**changes: Any) -> AdapterReceipt:
    facts: dict[str, Any] = {
        "lock_digest": DIGEST,
        "strength": 6.0,
        "method": "LORA",
        "carrier": "adapter bias",
        "stacks": ("transformers",),
        "base": AdapterBase("bäse", "llama", DIGEST),
        "sites": (
            AdapterSite(0, "model.layers.0.self_attn.o_proj", (1, 3), True, "float32", 0.5, -2.0),
            AdapterSite(2, "model.layers.2.self_attn.o_proj", (0,), False, "bfloat16"),
        ),
        "adapter_digest": DIGEST,
        "biases_digest": DIGEST,
        "original_biases": {2: b"\x00\x01"},
        "written": {"b": DIGEST, "a": DIGEST},
        "original": {"a": DIGEST},
        "scaling": "peft",
        "allowed_gap": 0.02,
    }
    return AdapterReceipt(**facts | changes)


@pytest.mark.parametrize("one", [receipt(), receipt(scaling=None, allowed_gap=None, written={}, original_biases={})])
def test_comes_back_from_json_and_is_the_same_bytes(one: AdapterReceipt) -> None:
    text = json.dumps(one.to_dict())
    again = AdapterReceipt.from_dict(json.loads(text), "x")
    assert again == one
    assert json.dumps(again.to_dict()) == text
    assert "null" not in text
    assert again.layers == (0, 2)


BROKEN: list[tuple[str, Any]] = [
    ("format_version", True),
    ("format_version", 1.0),
    ("lock_digest", DIGEST.upper()),
    ("strength", -1),
    ("strength", float("nan")),
    ("method", "Lör"),
    ("carrier", "merge"),
    ("stacks", []),
    ("base", {"name": "b", "model_type": "llama"}),
    ("base", {"name": 1, "model_type": "llama", "weights_digest": DIGEST}),
    ("sites", []),
    ("adapter_digest", None),
    ("biases_digest", "0"),
    ("original_biases", {"02": ""}),
    ("original_biases", {"2": "?"}),
    ("written", {"a": 1}),
    ("original", []),
    ("scaling", None),
    ("allowed_gap", -0.1),
    ("allowed_gap", float("inf")),
    ("unknown", 1),
]


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=str)
def test_anything_else_is_damaged(key: str, value: Any) -> None:
    with pytest.raises(fastlock.DamagedError, match="the receipt is damaged"):
        AdapterReceipt.from_dict(receipt().to_dict() | {key: value}, "x")


@pytest.mark.parametrize("key", [key for key in receipt().to_dict() if key not in ("scaling", "allowed_gap")])
def test_a_key_that_is_missing_is_damage(key: str) -> None:
    data = receipt().to_dict()
    del data[key]
    with pytest.raises(fastlock.DamagedError):
        AdapterReceipt.from_dict(data, "x")


SITES: list[tuple[str, Any]] = [
    ("layer", -1),
    ("layer", 2),
    ("heads", []),
    ("heads", [3, 1]),
    ("touched", 1),
    ("dtype", "int8"),
    ("gap", -1.0),
    ("gap", None),
    ("scale", "1"),
    ("scale", float("inf")),
    ("other", 0),
]


@pytest.mark.parametrize(("key", "value"), SITES, ids=str)
def test_a_site_that_cannot_be_is_damage(key: str, value: Any) -> None:
    data = receipt().to_dict()
    data["sites"][0] |= {key: value}
    with pytest.raises(fastlock.DamagedError):
        AdapterReceipt.from_dict(data, "x")


def test_a_newer_format_asks_for_an_upgrade() -> None:
    with pytest.raises(fastlock.UnsupportedError, match="Upgrade fastlock"):
        AdapterReceipt.from_dict(receipt().to_dict() | {"format_version": 3, "new": 1}, "x")
