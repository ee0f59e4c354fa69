"""What each stack makes of a checkpoint's lock."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlock
from fastlock.architectures.serving_stacks import STACKS, acts, architecture
from fastlock.checkpoints.diagnosis import doctor
from fastlock.checkpoints.layout import NEW_SHARD
from fastlock.kernels.launch_paths import launch_paths
from tests.helpers.families import random_lock, tiny_model


def relocked(tmp_path, kind: str = "llama", stacks=("transformers",)):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "source")
    fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out", stacks=stacks)
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "granite", "mistral", "gpt2"])
def test_it_says_what_the_table_says(kind: str, tmp_path) -> None:
    directory = relocked(tmp_path, kind)
    family = "llama" if kind == "mistral" else kind
    for finding in doctor(directory, STACKS):
        needs_more = architecture(family, finding.stack) is not None  # which was not asked for
        assert finding.acts == (finding.stack in acts(family) and not needs_more), finding
        assert finding.stack in finding.reason


def test_a_checkpoint_that_is_not_relocked(tmp_path) -> None:
    relocked(tmp_path, "mistral")
    (finding,) = doctor(tmp_path / "source", ["transformers"])
    assert not finding.acts
    assert "would be carried in llama form" in finding.reason


def change_config(directory) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": False}))


def drop(name: str):
    def change(directory) -> None:
        tensors = load_file(directory / NEW_SHARD)
        del tensors[name]
        save_file(tensors, directory / NEW_SHARD, metadata={"format": "pt"})
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("change", "message", "stacks"),
    [
        (change_config, "does not set attention_bias", STACKS),
        (drop("model.layers.0.self_attn.o_proj.bias"), "lack a locked layer's bias", STACKS),
        (drop("model.layers.1.self_attn.q_proj.bias"), "leaves undefined", ["vllm"]),
    ],
)
def test_it_notices_what_is_missing(change, message: str, stacks, tmp_path) -> None:
    directory = relocked(tmp_path)
    change(directory)
    for finding in doctor(directory, stacks):
        assert not finding.acts
        assert message in finding.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_machine_without_a_gpu_folds_by_the_reference() -> None:
    (path,) = launch_paths()
    assert (path.device, path.path) == ("CPU", "reference")
    assert "no CUDA device" in path.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_gpu_has_a_path() -> None:
    *gpus, _ = launch_paths()
    assert len(gpus) == torch.cuda.device_count()
    assert {path.path for path in gpus} <= {"cubin", "jit"}
