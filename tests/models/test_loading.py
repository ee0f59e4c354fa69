"""Loading models to run them: on the GPUs, if there are any."""

from typing import Any

import pytest
import torch
import transformers

from fastlock.models import loading as pretrained
from fastlock.models.loading import load_model
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
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: object() if accelerate else None)
    load_model(tmp_path, to_run=True)
    assert loaded == [asked]
