"""Relocked checkpoints in old and new releases of transformers: the lock acts, and texts become the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlock
from fastlock.architectures.families import FAMILIES
from fastlock.architectures.llama_form import LLAMA_FORM
from fastlock.architectures.serving_stacks import acts
from fastlock.models.sites import sites_for
from tests.helpers.families import gated_lock, random_lock, tiny_model
from tests.helpers.tokenizer_files import CASES, write_tokenizer

HERE = Path(__file__).parent
STRENGTH = 4.0
PYTHONS = {
    version: str(HERE.parents[1] / f".venv-transformers-{version}" / "bin" / "python")
    for version in ("4.46.3", "4.57.6", "5.3.0")
} | {"newest": sys.executable}

NATIVE = sorted(model_type for model_type in FAMILIES if "transformers" in acts(model_type))
# What a release does not know yet.
ABSENT = {
    "4.46.3": (
        "apertus arcee cohere2 dots1 ernie4_5 ernie4_5_moe gemma3_text gpt_oss hunyuan_v1_dense olmo2 olmo3 qwen3 "
        "qwen3_moe seed_oss smollm3"
    ).split(),
}

# Keys of a config.json as its family's released checkpoints have them, which older releases read.
KEYS = {"qwen3_moe": {"num_experts": 4}}
THETA = {"rope_theta": 1000000.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# In Llama form: a name, the family, what the tiny model is, and further keys; None takes a key out.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("mistral", {}, THETA),
    "mistral without defaults": (
        "mistral",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 14336, "head_dim": 8},
        THETA | dict.fromkeys(("num_key_value_heads", "intermediate_size", "max_position_embeddings", "head_dim")),
    ),
    "qwen2": ("qwen2", {"head_dim": 16}, THETA),
    "qwen2 scaled": ("qwen2", {"head_dim": 16}, THETA | {"rope_scaling": YARN}),
    "qwen2 without defaults": (
        "qwen2",
        {"num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 22016, "head_dim": 2},
        THETA | dict.fromkeys(("num_key_value_heads", "intermediate_size", "max_position_embeddings", "head_dim")),
    ),
}
SLICES = {"pretraining_tp": 2}
MODELS = {model_type: (model_type, {}, KEYS.get(model_type, {})) for model_type in NATIVE} | FORMS
MODELS["llama in slices"] = ("llama", {}, SLICES)
# With a gate alone, which is in the weights: also of families that drop a bias.
GATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{model_type} gated": (model_type, changes, {})
    for model_type, changes in {"llama": {}, "gpt2": {}, "stablelm": {}, "mixtral": {"head_dim": 16}}.items()
}
# Relocked in memory, then saved by the installed transformers, in its own words: so is the original.
FROM_MEMORY = {f"{model_type} from memory": (model_type, {"head_dim": 16}) for model_type in ("llama", *LLAMA_FORM)}


def in_old_words(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it."""
    old = dict(config)
    rope = old.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        rope = old.pop("rope_parameters")
        old |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        old["rope_scaling"] = None
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return old | {"transformers_version": "4.46.0"}


def prepare(name: str, directory: Path) -> None:
    """Save a tiny model as it would have been released, and relock it on disk."""
    model_type, changes, keys = (MODELS | GATED)[name]
    model = tiny_model(model_type, **changes)
    lock = gated_lock(model, constant=False) if name in GATED else random_lock(model)
    model.save_pretrained(directory / "original")
    file = directory / "original" / "config.json"
    config = in_old_words(json.loads(file.read_text())) | keys
    left_out = [key for key, value in keys.items() if value is None]
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}))
    fastlock.relock_checkpoint(directory / "original", lock, directory / "relocked", STRENGTH, stacks=["transformers"])
    if keys == SLICES:  # in slices, there is no projection before which anything could be added
        file.write_text(json.dumps(config | {"pretraining_tp": 1}))
    save_shifts(model, lock, directory)


def prepare_from_memory(name: str, directory: Path) -> None:
    """Save a tiny model as it is, relock it, and save it again."""
    model_type, changes = FROM_MEMORY[name]
    model = tiny_model(model_type, **changes)
    lock = random_lock(model)
    model.save_pretrained(directory / "original")
    save_shifts(model, lock, directory)
    fastlock.relock(model, lock, STRENGTH)
    model.save_pretrained(directory / "relocked")


def save_shifts(model: Any, lock: fastlock.Lock, directory: Path) -> None:
    """What is added to the input x of each locked projection: d, V and U of d + U Vᵀ x."""
    shifts = {}
    for site in sites_for(model, lock):
        d = torch.zeros(site.num_heads, site.head_dim)
        v, u = (torch.zeros(site.num_heads, site.head_dim, lock.rank) for _ in range(2))
        for row, (layer, head) in enumerate(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)):
            if layer == site.layer:
                d[head] = STRENGTH * lock.scales[row] * lock.directions[row]
                if lock.rank:
                    v[head], u[head] = lock.readers[row].T, STRENGTH * lock.writers[row].T
        shifts[site.name] = (d.flatten(), v.flatten(0, 1), u.flatten(0, 1))
    torch.save(shifts, directory / "shifts.pt")


def run(script: Path, version: str, directories: list[Path]) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [PYTHONS[version], str(script), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("versions")
    for name in MODELS:
        prepare(name, directory / name)
    for name in FROM_MEMORY:
        prepare_from_memory(name, directory / name)
    return directory


@pytest.fixture(scope="module", params=PYTHONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def compared(version, prepared) -> dict[str, Any]:
    return run(HERE / "run_transformers.py", version, [prepared / name for name in (*MODELS, *FROM_MEMORY)])


@pytest.mark.parametrize("name", [*MODELS, *FROM_MEMORY])
def test_the_lock_acts(name: str, version: str, prepared, compared) -> None:
    found = compared[str(prepared / name)]
    if name in ABSENT.get(version, ()):
        assert "does not recognize this architecture" in found
        pytest.skip(f"transformers {version} does not know {name}")
    assert isinstance(found, dict), found
    assert found["effect"] > 0.05
    assert found["error"] < 1e-4 * max(1.0, found["effect"])


@pytest.fixture(scope="module")
def prepared_gated(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gated")
    for name in GATED:
        prepare(name, directory / name)
    return directory


def test_the_gate_acts(version: str, prepared_gated) -> None:
    found = run(HERE / "run_transformers.py", version, [prepared_gated / name for name in GATED])
    for name in GATED:
        of_name = found[str(prepared_gated / name)]
        assert isinstance(of_name, dict), of_name
        assert of_name["effect"] > 0.05
        assert of_name["error"] < 1e-4 * max(1.0, of_name["effect"])


@pytest.fixture(scope="module")
def tokenized(version, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("tokenizers")
    for case, (model_type, _, _) in CASES.items():
        model = tiny_model(model_type)
        model.save_pretrained(directory / case / "original")
        config = directory / case / "original" / "config.json"
        config.write_text(json.dumps(in_old_words(json.loads(config.read_text()))))
        write_tokenizer(case, directory / case / "original")
        fastlock.relock_checkpoint(directory / case / "original", random_lock(model), directory / case / "relocked")
    both = [directory / case / side for case in CASES for side in ("original", "relocked")]
    return directory, run(HERE.parent / "helpers" / "read_tokenizers.py", version, both)


@pytest.mark.parametrize("case", CASES)
def test_texts_become_the_same_tokens(case: str, version: str, tokenized) -> None:
    directory, found = tokenized
    original = found[str(directory / case / "original")]
    assert isinstance(original, dict), original
    assert found[str(directory / case / "relocked")] == original


def test_the_forms_are_of_every_family_that_has_one() -> None:
    assert {model_type for model_type, _, _ in FORMS.values()} == set(LLAMA_FORM)
