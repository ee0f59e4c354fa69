"""Real vLLM on relocked checkpoints: where the lock acts, and where it is lost without an error."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastlock.architectures.families import FAMILIES
from fastlock.architectures.serving_stacks import acts, architecture
from tests.helpers import quantised
from tests.serving.prepared import (
    PROMPT,
    Prepared,
    far,
    log_probabilities,
    prepare,
    prepare_gated,
    prepare_quantised,
)

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
    return run_all(list(prepared.values()), "float32")


def run_all(prepared: list[Prepared], dtype: str) -> dict[str, str]:
    command = [str(PYTHON), str(HERE / "run_vllm.py"), ",".join(map(str, PROMPT)), dtype]
    directories = [str(one.directory) for one in prepared]
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


# A gate is in the weights, also of families whose bias vLLM drops.
GATED = ["llama", "gpt2", "mixtral", "stablelm"]


@pytest.fixture(scope="module")
def prepared_gated(tmp_path_factory) -> dict[str, Prepared]:
    directory, stacks = tmp_path_factory.mktemp("gated"), ["transformers", "vllm"]
    return {kind: prepare_gated(kind, directory, stacks, CHANGES.get(kind, LARGE_HEADS), {}) for kind in GATED}


@pytest.fixture(scope="module")
def errors_gated(prepared_gated) -> dict[str, str]:
    return run_all(list(prepared_gated.values()), "float32")


@pytest.mark.parametrize("kind", GATED)
def test_the_gate_acts(kind: str, prepared_gated, errors_gated) -> None:
    one = prepared_gated[kind]
    assert errors_gated[str(one.directory)] == ""
    found, (plain, locked) = np.load(f"{one.directory}.npy"), expected(one)
    assert far(plain, locked) > 15 * TOLERANCE
    assert far(found, locked) < TOLERANCE


@pytest.mark.parametrize("kind", LOST)
def test_the_lock_is_lost_in_its_own_code(kind: str, prepared, errors) -> None:
    one = prepared[kind, "transformers"]
    assert errors[str(one.directory)] == ""
    found, (plain, locked) = np.load(f"{one.directory}.npy"), expected(one)
    assert not far(found, locked) < far(plain, locked) / 2


# vLLM's kernels for quantised weights on a CPU: no others there than those of 4 bits.
QUANTISED = {
    "gptq": partial(quantised.gptq, symmetric=True),
    "awq": quantised.awq,
    "w4a16": partial(
        quantised.compressed, layout="pack-quantized", symmetric=True, num_bits=4, strategy="group", group_size=32
    ),
}
# Such a lock moves the log-probabilities by 1.8 and 3.4 (root mean square) in exact arithmetic. In bfloat16, in which
# vLLM computes, it is off without a lock too; how far depends on the CPU: 0.1 to 0.2.
STRONG = 40.0


@pytest.fixture(scope="module")
def prepared_quantised(tmp_path_factory) -> dict[str, Prepared]:
    changes, directory = {"hidden_size": 128, "intermediate_size": 256}, tmp_path_factory.mktemp("quantised")
    return {name: prepare_quantised(name, write, directory, STRONG, changes) for name, write in QUANTISED.items()}


@pytest.fixture(scope="module")
def errors_quantised(prepared_quantised) -> dict[str, str]:
    relocked = list(prepared_quantised.values())
    return run_all([*relocked, *(replace(one, directory=original(one)) for one in relocked)], "bfloat16")


def original(one: Prepared) -> Path:
    return one.directory.with_name(one.directory.name.removesuffix("-relocked"))


@pytest.mark.parametrize("name", QUANTISED)
def test_the_lock_acts_on_quantised_weights(name: str, prepared_quantised, errors_quantised) -> None:
    """As on the weights that they stand for, to the noise that vLLM has without a lock."""
    one = prepared_quantised[name]
    assert errors_quantised[str(one.directory)] == errors_quantised[str(original(one))] == ""
    plain, locked = expected(one)
    served_plain, served = (np.load(f"{directory}.npy") for directory in (original(one), one.directory))
    noise, shift = apart(served_plain, plain), locked - plain
    assert apart(plain, locked) > 5 * noise
    assert apart(served, locked) < 1.5 * noise
    # Which part of the lock acts, by least squares: 1 if all of it does.
    assert abs(float(((served - served_plain) * shift).sum() / (shift * shift).sum()) - 1) < 0.05


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square of the differences."""
    return float(np.sqrt(((a - b) ** 2).mean()))
