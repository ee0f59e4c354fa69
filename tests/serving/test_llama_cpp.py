"""Real llama.cpp on relocked checkpoints, by its own converter: where the lock acts, and where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlock.architectures.families import FAMILIES
from fastlock.architectures.serving_stacks import acts
from tests.serving.prepared import PROMPT, Prepared, far, prepare, prepare_gated

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venv-llama-cpp"
# llama.cpp looks GELU up in a table of half precision: 2^-11 of activations of some units, over three layers.
TOLERANCE = 0.01

ACT = [*sorted(kind for kind in FAMILIES if "llama.cpp" in acts(kind)), "qwen2"]  # Qwen2 in the Llama form
DO_NOT = sorted(kind for kind in FAMILIES if "transformers" in acts(kind) and kind not in ACT)

# What llama.cpp runs of a family where the other tests' tiny models have something else.
CHANGES = {
    "dots1": {"num_key_value_heads": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mixtral": {"sliding_window": None},
    "nemotron": {"head_dim": 16},
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
}
KEYS = {"gpt2": {"n_ctx": 64}, "gpt_neox": {"rotary_pct": 0.25}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Prepared]:
    directory = tmp_path_factory.mktemp("llama_cpp")
    return {
        kind: prepare(
            kind, directory, ["llama.cpp" if kind in ACT else "transformers"], CHANGES.get(kind, {}), KEYS.get(kind, {})
        )
        for kind in ACT + DO_NOT
    }


@pytest.fixture(scope="module")
def converted(prepared) -> dict[str, str]:
    return convert(prepared)


def convert(prepared: dict[str, Prepared]) -> dict[str, str]:
    """What went wrong with the conversion of which checkpoint, "" where nothing did."""
    directories = [str(one.directory) for one in prepared.values()]
    command = [sys.executable, str(HERE / "convert.py"), str(ENVIRONMENT / "llama.cpp"), *directories]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run(directory: Path) -> np.ndarray | str:
    """The logits at every position, [tokens, vocab], or why llama.cpp does not load it."""
    out = directory.with_suffix(".npy")
    command = [
        str(ENVIRONMENT / "bin" / "python"),
        str(HERE / "run_llama_cpp.py"),
        f"{directory}.gguf",
        str(out),
        ",".join(map(str, PROMPT)),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return np.load(out) if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("kind", ACT)
def test_the_lock_acts(kind: str, prepared, converted) -> None:
    one = prepared[kind]
    assert converted[str(one.directory)] == ""
    found = run(one.directory)
    assert not isinstance(found, str), found[-3000:]
    assert one.effect > 20 * TOLERANCE
    assert far(found, one.locked) < TOLERANCE
    assert far(found, one.plain) > one.effect - TOLERANCE


# A gate is in the weights, also of families whose bias llama.cpp drops.
GATED = ["llama", "gpt2", "qwen3", "stablelm"]


@pytest.fixture(scope="module")
def prepared_gated(tmp_path_factory) -> dict[str, Prepared]:
    directory = tmp_path_factory.mktemp("gated")
    return {
        kind: prepare_gated(kind, directory, ["llama.cpp"], CHANGES.get(kind, {}), KEYS.get(kind, {})) for kind in GATED
    }


@pytest.fixture(scope="module")
def converted_gated(prepared_gated) -> dict[str, str]:
    return convert(prepared_gated)


@pytest.mark.parametrize("kind", GATED)
def test_the_gate_acts(kind: str, prepared_gated, converted_gated) -> None:
    one = prepared_gated[kind]
    assert converted_gated[str(one.directory)] == ""
    found = run(one.directory)
    assert not isinstance(found, str), found[-3000:]
    assert one.effect > 20 * TOLERANCE
    assert far(found, one.locked) < TOLERANCE


@pytest.mark.parametrize("kind", DO_NOT)
def test_the_lock_does_not_get_through(kind: str, prepared, converted) -> None:
    one = prepared[kind]
    found = run(one.directory) if converted[str(one.directory)] == "" else "not converted"
    assert isinstance(found, str) or not far(found, one.locked) < one.effect / 2
