"""The logits at every position of a prompt, by llama.cpp in float32: run_llama_cpp.py MODEL OUT.npy IDS [LORA].

MODEL and LORA are GGUF files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import llama_cpp
import numpy as np


def without_amx():
    """Model parameters without kernels that want the weights in another order."""
    parameters = _parameters()
    parameters.use_extra_bufts = False
    return parameters


# Those for AMX end in a segmentation fault on quantised weights, SmolLM2's too, with a lock or without.
if "amx_int8" in Path("/proc/cpuinfo").read_text():
    _parameters = llama_cpp.llama_cpp.llama_model_default_params
    llama_cpp.llama_cpp.llama_model_default_params = without_amx

model, out, ids = sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3].split(",")]
lora = sys.argv[4] if len(sys.argv) > 4 else None
F32 = 0
loaded = llama_cpp.Llama(
    model,
    n_ctx=64,
    n_batch=64,
    n_threads=1,
    logits_all=True,
    type_k=F32,
    type_v=F32,
    flash_attn=False,
    lora_path=lora,
    verbose=True,
)
loaded.eval(ids)
np.save(out, loaded.scores[: len(ids)])
