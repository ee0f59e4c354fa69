"""Real vLLM with adapters over a relocked base: the base's biases act under them, and an adapter's own are refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fastlock
from tests.helpers.adapters import base_model, config_of, save_adapter
from tests.helpers.families import random_lock, tiny_model
from tests.helpers.relocked_adapters import adapted_logits, displaced_logits
from tests.serving.prepared import PROMPT, STRENGTH, far, log_probabilities

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
TOLERANCE = 0.005


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A directory with adapters over one relocked base, and what went wrong with which, "" where nothing did."""
    directory = tmp_path_factory.mktemp("adapters")
    base, lock = base_model(directory / "base"), random_lock(tiny_model("llama"))
    for name, kind, asked in (
        ("untouched", "elsewhere", {}),
        ("touched", "lora", {"gap": 100.0}),
        ("patterns", "patterns", {"gap": 100.0}),
        ("own", "lora", {"stacks": ["transformers"]}),
    ):
        source = save_adapter(config_of(kind), directory / name)
        fastlock.relock_adapter(source, base, lock, directory / f"{name}-out", STRENGTH, **asked)
    outs = [str(directory / f"{name}-out") for name in ("untouched", "touched", "patterns", "own")]
    command = [str(PYTHON), str(HERE / "run_vllm_adapters.py"), ",".join(map(str, PROMPT))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command += [str(directory / "base-locked"), *outs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory, json.loads(done.stdout.splitlines()[-1])


def test_an_adapter_that_leaves_the_base_alone_acts_as_with_d_added(served) -> None:
    directory, errors = served
    base, source, out = directory / "base", directory / "untouched", directory / "untouched-out"
    assert errors[str(out)] == ""
    lock = random_lock(tiny_model("llama"))
    locked = log_probabilities(displaced_logits(base, source, lock, STRENGTH)[0].numpy())[:-1]
    plain = log_probabilities(adapted_logits(base, source)[0].numpy())[:-1]
    found = np.load(f"{out}.npy")
    assert far(plain, locked) > 15 * TOLERANCE
    assert far(found, locked) < TOLERANCE


@pytest.mark.parametrize("name", ["touched", "patterns"])
def test_the_bases_bias_acts_under_an_adapter_that_touches_its_projection(name: str, served) -> None:
    directory, errors = served
    assert errors[str(directory / f"{name}-out")] == ""
    over = log_probabilities(adapted_logits(directory / "base-locked", directory / name)[0].numpy())[:-1]
    plain = log_probabilities(adapted_logits(directory / "base", directory / name)[0].numpy())[:-1]
    found = np.load(directory / f"{name}-out.npy")
    assert far(plain, over) > 15 * TOLERANCE
    assert far(found, over) < TOLERANCE


def test_a_bias_of_the_adapters_own_is_refused(served) -> None:
    directory, errors = served
    assert "lora_bias" in errors[str(directory / "own-out")]
