"""Which serving stacks use a bias on the attention output projection, and which drop it without an error.

At the versions in `CHECKED`: vLLM and llama.cpp are run on every family (`make test-serving`), SGLang's source was
read. docs/serving.md is the same table for people. What is not in the table counts as lost: a refusal can be mended,
but nobody notices a lock that is lost without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlock.architectures.families import ATTENTION, FAMILIES
from fastlock.errors import FastlockError

STACKS = ("transformers", "vllm", "sglang", "llama.cpp")
DEFAULT_STACKS = ("transformers", "vllm")
CHECKED = {"transformers": "5.23", "vllm": "0.32", "sglang": "0.5.23", "llama.cpp": "in llama-cpp-python 0.3.36"}

# The stacks beside transformers that use the bias; what transformers does is in `families.FAMILIES`. vLLM has no code
# of its own for arcee, dots1, gpt_bigcode, gpt_neox, hunyuan_v1_dense, olmo*, phi, seed_oss, smollm3 and starcoder2,
# and runs transformers'.
_OTHERS = {
    "apertus": "vllm sglang llama.cpp",
    "arcee": "vllm sglang",
    "bloom": "vllm llama.cpp",
    "cohere": "vllm",
    "cohere2": "vllm",
    "dots1": "vllm",
    "ernie4_5": "vllm",
    "ernie4_5_moe": "vllm",
    "falcon": "vllm",
    "gemma": "vllm",
    "gemma2": "vllm sglang",
    "gemma3_text": "vllm sglang",
    "gpt2": "vllm sglang llama.cpp",
    "gpt_bigcode": "vllm llama.cpp",
    "gpt_neox": "vllm llama.cpp",
    "gpt_oss": "vllm sglang llama.cpp",
    "granite": "vllm llama.cpp",
    "granitemoe": "vllm llama.cpp",
    "hunyuan_v1_dense": "vllm",
    "llama": "vllm sglang llama.cpp",
    "mistral": "vllm sglang llama.cpp",
    "mixtral": "llama.cpp",
    "nemotron": "vllm llama.cpp",
    "olmo": "vllm sglang",
    "olmo2": "vllm sglang",
    "olmo3": "vllm",
    "olmoe": "vllm",
    "opt": "vllm sglang",
    "phi": "vllm sglang llama.cpp",
    "phi3": "vllm sglang",
    "phimoe": "vllm sglang",
    "qwen3": "vllm sglang",
    "qwen3_moe": "vllm sglang",
    "seed_oss": "vllm",
    "smollm3": "vllm",
    "starcoder2": "vllm sglang llama.cpp",
}

# vLLM's code for these drops the bias without an error. Under this architecture in config.json it runs transformers'
# code for them (its "Transformers modeling backend"), which uses the bias.
_DENSE, _MOE = "TransformersForCausalLM", "TransformersMoEForCausalLM"
_IN_VLLM_BY_TRANSFORMERS = dict.fromkeys(("cohere", "cohere2", "ernie4_5", "gemma", "qwen3"), _DENSE)
_IN_VLLM_BY_TRANSFORMERS |= dict.fromkeys(("ernie4_5_moe", "granitemoe", "olmoe", "qwen3_moe"), _MOE)

# The modules that get a bias in vLLM and SGLang with it, where they are not those of transformers' own flag. Every one
# of them must be in the files: vLLM leaves those it does not find uninitialised.
_NEEDS = {"mistral": ATTENTION, "phi3": ("self_attn.qkv_proj", "self_attn.o_proj")}


def acts(model_type: str) -> frozenset[str]:
    """The stacks in which an output projection bias of this family's own form acts; none for an unknown family."""
    if model_type not in FAMILIES:
        return frozenset()
    stacks = {"transformers"} if FAMILIES[model_type].bias_flag is not None else set()
    return frozenset(stacks | set(_OTHERS.get(model_type, "").split()))


def native_flag(model_type: str, stack: str) -> str | None:
    """The config key that gives the projection a bias in this stack.

    It is "" where the projection always has one, and None where the stack has no place for it.
    """
    if stack not in acts(model_type):
        return None
    flag = FAMILIES[model_type].bias_flag
    return "attention_bias" if flag is None else flag


def architecture(model_type: str, stack: str) -> str | None:
    """The architecture that config.json must name for the bias to act in this stack; None for the family's own."""
    return _IN_VLLM_BY_TRANSFORMERS.get(model_type) if stack == "vllm" else None


def named_architecture(config: dict[str, Any]) -> str | None:
    """The architecture that a config.json names, None where it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def why_lost(model_type: str, stack: str, text_config: Any, named: str | None) -> str | None:
    """Why a stack would drop the biases of a checkpoint with this config; None where it uses them.

    Args:
        model_type: the family.
        stack: one of `STACKS`; any other counts as losing them.
        text_config: the decoder's config, as transformers reads it.
        named: the architecture that config.json names.
    """
    flag = native_flag(model_type, stack)
    if flag is None:
        return f"{stack} has no place for the bias in a {model_type} model and silently drops it"
    if flag and not getattr(text_config, flag, False):
        return f"config.json does not set {flag}, and without it {stack} silently drops the biases"
    needed = architecture(model_type, stack)
    if needed not in (None, named):
        return f"config.json does not name {needed}, and without it {stack} silently drops the biases"
    if stack not in ("transformers", "vllm") and named in (_DENSE, _MOE):
        return f"config.json names {named}, which is for vllm; nobody has checked what {stack} makes of it"
    return None


def needs(model_type: str, stack: str) -> tuple[str, ...]:
    """The modules of a layer whose bias must be in the files, zeros included, once the flag is on in this stack."""
    if stack == "transformers" or stack not in acts(model_type):
        return ()
    family = FAMILIES[model_type]
    return _NEEDS.get(model_type, family.switched if family.bias_flag else ())


def check_stacks(stacks: Sequence[str]) -> tuple[str, ...]:
    """The stacks asked for, each once.

    Raises:
        FastlockError: there are none, or one is unknown.
    """
    known = f"give a list of serving stacks, one or more of {', '.join(STACKS)}."
    if isinstance(stacks, str) or not stacks:
        raise FastlockError(f"stacks is {stacks!r}; {known}")
    for stack in stacks:
        if stack not in STACKS:
            raise FastlockError(f"{stack!r} is not a serving stack that fastlock knows; {known}")
    return tuple(dict.fromkeys(stacks))
