"""What serving stacks make of a bias beside a quantised projection, as far as is known: doctor's table of formats.

Every stack adds it. What differs is what that takes, and whether it was run or read in the stack's source.
"""

from __future__ import annotations

_READ = "read in its source, not run"
_GPTQMODEL = f"{_READ}; it needs gptqmodel and optimum"
_PLUGIN = f"{_READ}; since vLLM 0.28 it needs the plugin vllm-bnb-plugin"
_FP8 = "run with a scale a row; blocks read in its source, not run"

# By stack, then by the names of `table.KINDS`; without a line: run, with biases of a lock.
_NOTES: dict[str, dict[str, str]] = {
    "transformers": {"GPTQ": _GPTQMODEL, "AWQ": _GPTQMODEL},
    "vllm": {
        "GPTQ": "run on a CPU, where it refuses act-order with groups",
        "NVFP4 or MXFP4": _READ,
        "int8 or FP8": _FP8,
        "bitsandbytes 4-bit": _PLUGIN,
        "bitsandbytes int8": _PLUGIN,
    },
}


def note_on(layout: str, stack: str) -> str:
    """What is to be known of a format in a stack, in a few words.

    Args:
        layout: a name of `table.KINDS`.
        stack: the serving stack.
    """
    return _READ if stack == "sglang" else _NOTES.get(stack, {}).get(layout, "run")
