"""Which serving stacks use a bias on the attention output projection, and which drop it without an error.

Read in the stacks' sources, at the versions in `CHECKED`; docs/serving.md is the same table for people. What is not in
the table has not been checked, and counts as lost: a refusal can be mended, a lock lost in silence is not noticed.
"""

from __future__ import annotations

from fastlock.sites import ATTENTION, FAMILIES

STACKS = ("transformers", "vllm", "sglang", "llama.cpp")
CHECKED = {"transformers": "5.23", "vllm": "0.32", "sglang": "0.5.23", "llama.cpp": "in llama-cpp-python 0.3.36"}

# The stacks beside transformers that use the bias; what transformers does is in `sites.FAMILIES`. vLLM runs arcee,
# gpt_bigcode, gpt_neox, hunyuan_v1_dense, olmo*, phi, seed_oss, smollm3 and starcoder2 by transformers' own code.
_OTHERS = {
    "apertus": "vllm sglang",
    "arcee": "vllm sglang",
    "bloom": "vllm",
    "falcon": "vllm",
    "gemma2": "vllm sglang",
    "gemma3_text": "vllm sglang",
    "gpt2": "vllm sglang",
    "gpt_bigcode": "vllm",
    "gpt_neox": "vllm",
    "gpt_oss": "vllm sglang llama.cpp",
    "granite": "vllm llama.cpp",
    "hunyuan_v1_dense": "vllm",
    "llama": "vllm sglang llama.cpp",
    "mistral": "vllm sglang llama.cpp",
    "mixtral": "llama.cpp",
    "nemotron": "vllm",
    "olmo": "vllm sglang",
    "olmo2": "vllm sglang",
    "olmo3": "vllm",
    "opt": "vllm sglang",
    "phi": "vllm sglang",
    "phi3": "vllm sglang",
    "phimoe": "vllm sglang",
    "qwen3": "sglang",
    "qwen3_moe": "sglang",
    "seed_oss": "vllm",
    "smollm3": "vllm",
    "starcoder2": "vllm sglang",
}

# The modules that get a bias in vLLM and SGLang with it, where they are not those of transformers' own flag. Every one
# of them must be in the files: vLLM leaves those it does not find uninitialised.
_NEEDS = {"mistral": ATTENTION, "phi3": ("self_attn.qkv_proj", "self_attn.o_proj")}


def acts(model_type: str) -> frozenset[str]:
    """The stacks in which an output projection bias of this family's own form acts; none for an unknown family."""
    if model_type not in FAMILIES:
        return frozenset()
    mine = {"transformers"} if FAMILIES[model_type].bias_flag is not None else set()
    return frozenset(mine | set(_OTHERS.get(model_type, "").split()))


def native_flag(model_type: str, stack: str) -> str | None:
    """The config key that gives the projection a bias there: "" where it always has one, None where it has no place."""
    if stack not in acts(model_type):
        return None
    flag = FAMILIES[model_type].bias_flag
    return "attention_bias" if flag is None else flag


def needs(model_type: str, stack: str) -> tuple[str, ...]:
    """The modules of a layer whose bias must be in the files, zeros included, once the flag is on there."""
    if stack == "transformers" or stack not in acts(model_type):
        return ()
    family = FAMILIES[model_type]
    return _NEEDS.get(model_type, family.switched if family.bias_flag else ())
