"""Gates as LoRAs in real servers: vLLM and llama.cpp, with the adapter and without it; and SGLang's source."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import fastlock
from tests.helpers.adapters import base_model, config_of, save_adapter
from tests.helpers.families import gated_lock, logits, tiny_model
from tests.helpers.gated_adapters import gated_logits
from tests.helpers.relocked_adapters import adapted_logits
from tests.serving.prepared import IDS, PROMPT, far, log_probabilities

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LLAMA_CPP = ROOT / ".venv-llama-cpp"
STRENGTH, TOLERANCE = 1.5, 0.01
# The adapter, if there is one beside the gate, and the stacks that it is relocked for.
KINDS: dict[str, tuple[str | None, list[str]]] = {
    "alone": (None, ["vllm", "llama.cpp"]),
    "within": ("lora", ["vllm"]),
    "rslora": ("rslora", ["vllm"]),
    "beside": ("elsewhere", ["vllm"]),
    "one rank": ("rslora", ["vllm", "sglang", "llama.cpp"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters over it with a gate in them."""
    directory = tmp_path_factory.mktemp("gates")
    base, lock = base_model(directory / "base"), gated_lock(tiny_model("llama"), constant=False)
    for name, (kind, stacks) in KINDS.items():
        out = directory / f"{name}-out"
        if kind is None:
            fastlock.relock_as_adapter(base, lock, out, STRENGTH, stacks=stacks)
        else:
            source = save_adapter(config_of(kind), directory / name)
            fastlock.relock_adapter(source, base, lock, out, STRENGTH, stacks=stacks)
    return directory


def truths(files: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The logits without the gate and with it, [tokens, vocab] float64, of nothing folded."""
    lock = gated_lock(tiny_model("llama"), constant=False)
    source = None if KINDS[name][0] is None else files / name
    plain = logits(tiny_model("llama").double(), IDS) if source is None else adapted_logits(files / "base", source)
    return plain[0].numpy(), gated_logits(files / "base", source, lock, STRENGTH)[0].numpy()


def run(*command: object) -> str:
    """What a command prints; the end of its errors, if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def served(files: Path) -> dict[str, str]:
    """What went wrong in vLLM with which adapter, or with none, "" where nothing did: all in one engine."""
    outs = [files / f"{name}-out" for name in KINDS]
    script, python = HERE / "run_vllm_adapters.py", ROOT / ".venv-vllm" / "bin" / "python"
    said = run(python, script, ",".join(map(str, PROMPT)), files / "base", *outs, files / "base")
    errors: dict[str, str] = json.loads(said.splitlines()[-1])
    return errors


@pytest.mark.parametrize("name", KINDS)
def test_vllm_serves_the_gate(name: str, files: Path, served: dict[str, str]) -> None:
    out = files / f"{name}-out"
    assert served[str(out)] == ""
    plain, gated = (log_probabilities(one)[:-1] for one in truths(files, name))
    found = np.load(f"{out}.npy")
    assert far(plain, gated) > 20 * TOLERANCE
    assert far(found, gated) < TOLERANCE


def test_vllm_answers_without_the_gate_where_none_is_asked_for(files: Path, served: dict[str, str]) -> None:
    assert served[str(files / "base")] == ""
    plain, _ = truths(files, "alone")
    assert far(np.load(files / "base.npy"), log_probabilities(plain)[:-1]) < TOLERANCE


@pytest.fixture(scope="module")
def base_gguf(files: Path) -> Path:
    """The base, as llama.cpp loads it."""
    said = run(sys.executable, HERE / "convert.py", LLAMA_CPP / "llama.cpp", files / "base")
    assert json.loads(said.splitlines()[-1]) == {str(files / "base"): ""}
    return files / "base.gguf"


@pytest.mark.parametrize("name", ["alone", "one rank"])
def test_llama_cpp_serves_the_gate(name: str, files: Path, base_gguf: Path) -> None:
    lora, found = files / f"{name}.gguf", files / f"{name}.npy"
    converter = LLAMA_CPP / "llama.cpp" / "convert_lora_to_gguf.py"
    run(sys.executable, converter, files / f"{name}-out", "--base", files / "base", "--outfile", lora)
    python, script = LLAMA_CPP / "bin" / "python", HERE / "run_llama_cpp.py"
    run(python, script, base_gguf, found, ",".join(map(str, PROMPT)), lora)
    plain, gated = truths(files, name)
    assert far(plain, gated) > 20 * TOLERANCE
    assert far(np.load(found), gated) < TOLERANCE


def test_sglang_takes_the_modules_the_rank_and_the_scale(files: Path) -> None:
    """It does not run on a CPU: its own lines are, and what they say of A and s is read."""
    source = ROOT / ".venv-sglang" / "sglang" / "srt" / "lora"
    tree = ast.parse((source / "utils.py").read_text())
    wanted = "get_normalized_target_modules"
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == wanted)
    names: dict[str, Any] = {}
    exec("from typing import *\n" + ast.unparse(function), names)
    assert "self.scaling: float = self.config.lora_alpha / self.config.r" in (source / "lora.py").read_text()
    assert "buffer_view.shape == weight.shape" in (source / "mem_pool.py").read_text()
    for name, modules in (("alone", {"o_proj"}), ("one rank", {"o_proj", "qkv_proj", "down_proj"})):
        config = json.loads((files / f"{name}-out" / "adapter_config.json").read_text())
        assert names[wanted](config["target_modules"]) == modules
        tensors = safetensors.torch.load_file(files / f"{name}-out" / "adapter_model.safetensors")
        assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {config["r"]}
