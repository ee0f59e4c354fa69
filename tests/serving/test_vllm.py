"""Real vLLM on relocked checkpoints: where the lock acts, and where it is lost without an error."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fastlock.architectures.families import FAMILIES
from fastlock.architectures.serving_stacks import acts, architecture
from tests.serving.prepared import PROMPT, Prepared, far, log_probabilities, prepare

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
TOLERANCE = 0.005
# vLLM keeps Apertus' activation's parameters in bfloat16 (eight bits) whatever the model's dtype.
COARSE = {"apertus": 0.05}

ACT = [*sorted(kind for kind in FAMILIES if "vllm" in acts(kind)), "qwen2"]  # Qwen2 in the Llama form
# Without the architecture that makes vLLM run transformers' code for them.
LOST = [kind for kind in ACT if architecture(kind, "vllm") is not None]
LARGE_HEADS = {"hidden_size": 128}  # vLLM's attention on a CPU takes heads of 32 and more
TIED = {"tie_word_embeddings": True}
CHANGES = {
    **dict.fromkeys(
        "apertus dots1 ernie4_5_moe falcon gpt2 gpt_bigcode gpt_neox granite granitemoe".split(), LARGE_HEADS
    ),
    **dict.fromkeys("olmo olmo2 olmo3 olmoe phi phi3 phimoe smollm3 starcoder2".split(), LARGE_HEADS),
    **dict.fromkeys("bloom cohere cohere2".split(), LARGE_HEADS | TIED),
    **dict.fromkeys("gemma gemma2 gemma3_text".split(), TIED),
    "opt": LARGE_HEADS | {"word_embed_proj_dim": 128},
}
# The name that Microsoft's own checkpoints carry; vLLM knows no other.
KEYS = {"phimoe": {"architectures": ["PhiMoEForCausalLM"]}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[tuple[str, str], Prepared]:
    directory = tmp_path_factory.mktemp("vllm")
    return {
        (kind, stack): prepare(kind, directory / stack, [stack], CHANGES.get(kind, {}), KEYS.get(kind, {}))
        for stack, kinds in (("vllm", ACT), ("transformers", LOST))
        for kind in kinds
    }


@pytest.fixture(scope="module")
def errors(prepared) -> dict[str, str]:
    """Run all of them; what went wrong with which, "" where nothing did."""
    command = [str(PYTHON), str(HERE / "run_vllm.py"), ",".join(map(str, PROMPT))]
    directories = [str(one.directory) for one in prepared.values()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*command, *directories], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def expected(one: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """What vLLM says of a prompt without and with the lock: nothing of what comes after it."""
    return log_probabilities(one.plain)[:-1], log_probabilities(one.locked)[:-1]


@pytest.mark.parametrize("kind", ACT)
def test_the_lock_acts(kind: str, prepared, errors) -> None:
    one = prepared[kind, "vllm"]
    assert errors[str(one.directory)] == ""
    found, (plain, locked) = np.load(f"{one.directory}.npy"), expected(one)
    tolerance = COARSE.get(kind, TOLERANCE)
    assert far(plain, locked) > 15 * tolerance
    assert far(found, locked) < tolerance
    assert far(found, plain) > far(plain, locked) - tolerance


@pytest.mark.parametrize("kind", LOST)
def test_the_lock_is_lost_in_its_own_code(kind: str, prepared, errors) -> None:
    one = prepared[kind, "transformers"]
    assert errors[str(one.directory)] == ""
    found, (plain, locked) = np.load(f"{one.directory}.npy"), expected(one)
    assert not far(found, locked) < far(plain, locked) / 2
