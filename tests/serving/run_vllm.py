"""The logarithms of the probabilities of every token after every prompt position, by vLLM.

run_vllm.py IDS DTYPE DIRECTORY...: DIRECTORY.npy gets [tokens - 1, vocab]. Prints what went wrong with which, as JSON.
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


def run(directory: str, ids: list[int], dtype: str) -> np.ndarray:
    """Load a checkpoint, and read one prompt."""
    engine = LLM(
        directory,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=64,
        max_logprobs=-1,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    rows = [{token: found.logprob for token, found in row.items()} for row in answer.prompt_logprobs[1:]]
    return np.array([[row[token] for token in sorted(row)] for row in rows])


def main() -> None:
    """Run all of them in one process; an engine takes seconds to import."""
    ids, errors = [int(word) for word in sys.argv[1].split(",")], {}
    for directory in sys.argv[3:]:
        try:
            np.save(f"{directory}.npy", run(directory, ids, sys.argv[2]))
            errors[directory] = ""
        except Exception as error:  # an engine raises anything
            errors[directory] = f"{type(error).__name__}: {error}"
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
