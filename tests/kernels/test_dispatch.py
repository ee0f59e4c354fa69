"""`relock` through the kernel: one launch for a whole model, and the biases that its own weights give."""

import pytest
import torch
from families import random_lock, same_state, state, tiny_model

import fastlock
from fastlock import fold as fold_module
from fastlock.kernels import fold as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many sites each launch folds. Without a GPU, what is dispatched to CUDA runs in the interpreter."""
    sites: list[int] = []

    def launch(table: kernels.Table, _launch=kernels.launch) -> None:
        sites.append(len(table.sites))
        _launch(table)

    monkeypatch.setattr(kernels, "launch", launch)
    if DEVICE == "cpu":
        monkeypatch.setattr(fold_module, "_fold_on", lambda weight: fold_module._fold_cuda)
    return sites


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_a_model_is_one_launch(kind: str, launches: list[int]) -> None:
    model = tiny_model(kind).to(DEVICE)
    lock, before = random_lock(model, [(0, 1), (0, 3), (1, 2), (2, 0)]), state(model)
    fastlock.relock(model, lock, 2.0)
    assert launches == [3]
    assert fastlock.verify(model, lock)
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_many_models_of_one_kind_are_one_launch(launches: list[int]) -> None:
    models = [tiny_model("llama", seed=seed).to(DEVICE) for seed in range(3)]
    lock = random_lock(models[0])
    fastlock.relock_many(models, lock)
    assert launches == [6]
    assert all(fastlock.verify(model, lock) for model in models)
    fastlock.relock_many([models[0], tiny_model("gpt_oss").to(DEVICE)], lock)
    assert launches == [6, 4]
    fastlock.relock_many([models[0], tiny_model("llama", torch.float16).to(DEVICE)], lock)
    assert launches[2:] == [2, 2], "one launch for each dtype"
