"""What serving stacks make of PEFT adapters: which bias acts, by which scale they serve, and what they refuse.

At the versions in `serving_stacks.CHECKED`: PEFT, vLLM and llama.cpp are run, the source of SGLang was read.
docs/adapters.md is the same table for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# Initialisations that leave the base's weights as they are: a saved adapter loads as a plain LoRA.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class AdapterStack:
    """What one stack makes of adapters.

    Attributes:
        scaling: the rule by which it makes s of rank and alpha: PEFT's own, α/r whatever the config says ("sglang"), or
            the config's α over the tensor's rank ("llama.cpp").
        adapter_bias: whether a bias of the adapter's own acts (`lora_bias`).
        methods: PEFT's methods that it loads; None for all of them.
        refuses: the keys of adapter_config.json with which it does not load an adapter.
    """

    scaling: Literal["peft", "sglang", "llama.cpp"]
    adapter_bias: bool
    methods: frozenset[str] | None
    refuses: dict[str, Callable[[Any], bool]]


def _other_modules(value: Any) -> bool:
    names = value if isinstance(value, list) else [value] if value else []
    return any(name not in ("classifier", "score") for name in names)


def _other_start(value: Any) -> bool:
    return isinstance(value, str) and value.lower() not in PLAIN_STARTS


def _other_than_none(value: Any) -> bool:
    return value not in (None, "none")


_LORA = frozenset(("LORA",))

ADAPTER_STACKS = {
    "transformers": AdapterStack("peft", adapter_bias=True, methods=None, refuses={}),
    "vllm": AdapterStack(
        "peft",
        adapter_bias=False,
        methods=_LORA,
        refuses={
            "use_dora": bool,
            "lora_bias": bool,
            "bias": _other_than_none,
            "modules_to_save": _other_modules,
            "init_lora_weights": _other_start,
            "alora_invocation_tokens": bool,
            "layer_replication": bool,
            "use_bdlora": bool,
            "use_qalora": bool,
        },
    ),
    "sglang": AdapterStack(
        "sglang",
        adapter_bias=False,
        methods=_LORA,
        refuses={"use_dora": bool, "lora_bias": bool, "bias": _other_than_none, "modules_to_save": bool},
    ),
    "llama.cpp": AdapterStack(
        "llama.cpp",
        adapter_bias=False,
        methods=_LORA,
        refuses={"use_dora": bool, "lora_bias": bool, "bias": _other_than_none, "modules_to_save": bool},
    ),
}


def why_refused(stack: str, method: str, config: dict[str, Any]) -> str | None:
    """Why a stack does not load an adapter as it is, as a clause; None where it loads it.

    Args:
        stack: one of `serving_stacks.STACKS`.
        method: PEFT's, in upper case.
        config: the parsed adapter_config.json.
    """
    known = ADAPTER_STACKS[stack]
    if known.methods is not None and method not in known.methods:
        return f"{stack} loads no adapters of the method {method[:40]!a}"
    for key, refused in known.refuses.items():
        if key in config and refused(config[key]):
            return f"{stack} loads no adapter with {key} = {str(config[key])[:60]!a}"
    return None
