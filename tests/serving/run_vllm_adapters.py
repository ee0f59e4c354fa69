"""The logarithms of the probabilities of every token after every prompt position, by vLLM, with adapters over one base.

run_vllm_adapters.py IDS BASE ADAPTER...: ADAPTER.npy gets [tokens - 1, vocab], all of one engine. The base itself,
named as an adapter, stands for none. Prints what went wrong with which, as JSON.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    """Read one prompt with each adapter."""
    ids, errors = [int(word) for word in sys.argv[1].split(",")], {}
    engine = LLM(
        sys.argv[2],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_logprobs=-1,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    for number, adapter in enumerate(sys.argv[3:], start=1):
        try:
            request = None if adapter == sys.argv[2] else LoRARequest(adapter, number, adapter)
            prompt = {"prompt_token_ids": ids}
            (answer,) = engine.generate([prompt], sampling, use_tqdm=False, lora_request=request)
            rows = [{token: found.logprob for token, found in row.items()} for row in answer.prompt_logprobs[1:]]
            np.save(f"{adapter}.npy", np.array([[row[token] for token in sorted(row)] for row in rows]))
            errors[adapter] = ""
        except Exception as error:  # an engine raises anything
            errors[adapter] = f"{type(error).__name__}: {error}"
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
