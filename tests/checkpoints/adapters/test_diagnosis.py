"""What `doctor` says of adapters, for each stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastlock
from fastlock.architectures.serving_stacks import STACKS
from fastlock.checkpoints.adapters.diagnosis import AdapterFinding
from fastlock.checkpoints.adapters.folding import BasePart
from tests.helpers.adapters import config_of, layer_of, loaded, rewrite_config, save_adapter, shift

HERE = {"stacks": ["transformers"]}


def findings(directory: Path, **about: Any) -> dict[str, AdapterFinding]:
    found = fastlock.doctor(directory, STACKS, **about)
    return {finding.stack: finding for finding in found if isinstance(finding, AdapterFinding)}


@pytest.fixture(scope="module")
def rslora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(config_of("rslora"), tmp_path_factory.mktemp("rslora") / "adapter")


def test_tells_touched_layers_scales_gaps_and_carriers(base: Path, part: BasePart, rslora: Path) -> None:
    found = findings(rslora, base=base, lock=part.lock)
    assert {name: finding.carriers for name, finding in found.items()} == {
        "transformers": ("adapter bias", "merge"),
        "vllm": ("merge",),
        "sglang": ("merge",),
        "llama.cpp": ("merge",),
    }
    assert not any(finding.acts for finding in found.values())
    assert [(layer.layer, layer.touched, layer.scale) for layer in found["vllm"].layers] == [(0, True, 6), (2, True, 6)]
    model = loaded(base, rslora)
    for layer in found["transformers"].layers:
        module, d = layer_of(model, layer.layer), part.displacements[layer.layer].dense(128)
        product = module.get_base_layer().weight @ d
        gap = float((shift(module, d) - product).norm() / product.norm())
        assert layer.gap == pytest.approx(gap, rel=1e-12)
        sglang = next(other for other in found["sglang"].layers if other.layer == layer.layer)
        assert (sglang.peft_scale, sglang.scale) == (6, 3)
        assert sglang.gap == pytest.approx(gap / 2, rel=1e-12)


@pytest.mark.parametrize("stack", ["sglang", "llama.cpp"])
def test_says_which_stack_serves_it_otherwise(stack: str, base: Path, rslora: Path, tmp_path: Path) -> None:
    found = findings(rslora, base=base)
    assert f"{stack} serves the adapter itself otherwise than PEFT" in found[stack].reason
    assert "s = 3 instead of 6" in found[stack].reason
    assert all("otherwise" not in found[name].reason for name in ("transformers", "vllm"))
    elsewhere = save_adapter(config_of("elsewhere", use_rslora=True), tmp_path / "adapter")
    assert "q_proj with s = " in findings(elsewhere, base=base)[stack].reason
    assert "otherwise" not in findings(rewrite_config(elsewhere, use_rslora=False), base=base)[stack].reason


def test_without_a_lock_there_is_no_gap_and_without_a_base_no_layer(base: Path, rslora: Path, tmp_path: Path) -> None:
    found = findings(rslora, base=base)["transformers"]
    assert [(layer.layer, layer.touched, layer.gap) for layer in found.layers] == [(i, True, None) for i in range(3)]
    assert "touches the output projections of layers 0, 1, 2 with s = 6" in found.reason
    source = rewrite_config(save_adapter(config_of("dora"), tmp_path / "adapter"), base_model_name_or_path="who/knows")
    found = findings(source)
    assert "its base is not known: give it" in found["transformers"].reason
    assert "loads no adapter with use_dora" in found["vllm"].reason
    assert found["vllm"].layers == ()


def test_a_relocked_adapter_acts_where_its_carrier_does(base: Path, part: BasePart, rslora: Path, tmp_path) -> None:
    fastlock.relock_adapter(rslora, base, part.lock, tmp_path / "own", **HERE)
    found = findings(tmp_path / "own")
    assert {name for name, finding in found.items() if finding.acts} == {"transformers"}
    assert "loads no biases of an adapter" in found["vllm"].reason
    rewrite_config(tmp_path / "own", lora_bias=False)
    assert not findings(tmp_path / "own")["transformers"].acts
    fastlock.relock_adapter(rslora, base, part.lock, tmp_path / "beside", carrier="sidecar")
    assert not any(finding.acts for finding in findings(tmp_path / "beside").values())
    source = save_adapter(config_of("elsewhere"), tmp_path / "adapter")
    fastlock.relock_adapter(source, base, part.lock, tmp_path / "shared", stacks=["vllm", "llama.cpp"])
    for directory, about in (
        (tmp_path / "shared", {}),
        (source, {"base": tmp_path / "base-locked", "lock": part.lock}),
    ):
        acting = {name for name, finding in findings(directory, **about).items() if finding.acts}
        assert acting == {"vllm", "llama.cpp"}
    assert "is not relocked with it" in findings(tmp_path / "shared", base=base)["vllm"].reason


def test_a_checkpoint_is_examined_without_a_base_or_a_lock(base: Path, part: BasePart) -> None:
    for about in ({"base": base}, {"lock": part.lock}):
        with pytest.raises(fastlock.FastlockError, match="is no adapter"):
            fastlock.doctor(base, **about)
