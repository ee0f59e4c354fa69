"""Loading models: nothing lost or changed, and on the GPUs, if there are any, where they are to run."""

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastlock
from fastlock.models import loading
from fastlock.models.loading import load_model, load_tokenizer
from tests.helpers.families import tiny_model


@pytest.fixture
def loaded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A model in tmp_path, and how transformers is asked to load it and where it is moved."""
    tiny_model("llama").save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(directory: str, *, device_map: str | None = None, **options: Any) -> Any:
        asked.append({"device_map": device_map})
        return real(directory, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.nn.Module, "to", lambda _, device: asked[-1].update(to=device))
    return asked


def test_on_the_cpu_unless_it_is_to_run_on_a_gpu(tmp_path, monkeypatch, loaded) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_model(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load_model(tmp_path, to_run=True)
    assert loaded == [{"device_map": None}, {"device_map": None}]


@pytest.mark.parametrize(
    ("accelerate", "asked"), [(True, {"device_map": "auto"}), (False, {"device_map": None, "to": "cuda"})]
)
def test_to_run_it_is_on_the_gpus(tmp_path, monkeypatch, loaded, accelerate: bool, asked: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object() if accelerate else None)
    load_model(tmp_path, to_run=True)
    assert loaded == [asked]


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def with_another(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(65)


def of_another_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (without, fastlock.DamagedError, r"it lacks model\.norm\.weight, which LlamaForCausalLM needs \(1 in all\)"),
        (with_another, fastlock.UnsupportedError, r"LlamaForCausalLM has no place for its model\.layers\.0\.self_attn"),
        (
            of_another_shape,
            fastlock.DamagedError,
            r"its model\.norm\.weight has another shape than in LlamaForCausalLM",
        ),
        (of_another_dtype, fastlock.UnsupportedError, r"model\.norm\.weight is torch\.float64, and would be loaded as"),
    ],
)
def test_what_loading_would_change_is_refused(change, kind: type, message: str, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(fastlock.FastlockError, match=message) as error:
        load_model(tmp_path)
    assert type(error.value) is kind


def test_another_class_than_a_causal_language_model_is_refused(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaFor\x1b[1mScores"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(fastlock.UnsupportedError, match=r"a LlamaFor\\x1b\[1mScores, which would be loaded as a Llama"):
        load_model(tmp_path)


def test_what_is_not_there_or_not_a_checkpoint_is_told_apart(tmp_path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(fastlock.FastlockError, match="no such directory|its tokenizer cannot be loaded"):
            load(tmp_path / "missing")
    with pytest.raises(fastlock.FastlockError, match=r"cannot be loaded \(.*convert older \.bin files"):
        load_model(tmp_path)
