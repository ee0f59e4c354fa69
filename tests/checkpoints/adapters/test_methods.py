"""Every method, folded from its files, is what PEFT's own layer does in float64; the others are refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from torch import nn

from fastlock.checkpoints.adapters.folding import AdapterFolds, BasePart, fold_adapter
from fastlock.checkpoints.adapters.methods.markers import MARKERS
from fastlock.checkpoints.adapters.methods.table import ELSEWHERE, METHODS, REFUSED_AT_SITES, REFUSED_METHODS
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError
from tests.helpers.adapters import (
    KINDS,
    config_of,
    layer_of,
    loaded,
    read_adapter,
    rewrite_config,
    rewrite_tensors,
    save_adapter,
    shift,
)

ACTIONS = {
    "elsewhere": "untouched",
    "modules to save": "replaced",
    "ia3 of the output": "scaled",
    "road": "scaled",
}


def folds_of(directory: Path, part: BasePart, **keys: Any) -> AdapterFolds:
    return fold_adapter(read_adapter(directory), part.checkpoint, part.lock, part=part, **keys)


@pytest.mark.parametrize("kind", KINDS)
def test_folds_as_peft_computes(kind: str, base: Path, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of(kind), tmp_path / "adapter")
    folds = folds_of(directory, part)
    model = loaded(base, directory)
    assert [fold.layer for fold in folds] == [0, 2]
    for fold in folds:
        layer, d = layer_of(model, fold.layer), part.displacements[fold.layer].dense(128)
        expected = shift(layer, d)
        torch.testing.assert_close(fold.bias, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
        assert fold.action == ACTIONS.get(kind, "added")
        assert fold.shares_base == (kind in ("elsewhere", "ia3 of the output", "road"))
        _check_base_bias(layer, fold.base_bias, expected)
    assert len({fold.digest for fold in folds}) == (1 if kind == "elsewhere" else 2)


def _check_base_bias(layer: Any, base_bias: torch.Tensor | None, expected: torch.Tensor) -> None:
    """A base with this bias, too, has the adapted layer shifted by f at every position; None: no bias acts."""
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        inner = getattr(layer, "original_module", inner)
        inner.bias = nn.Parameter(torch.ones_like(expected) if base_bias is None else base_bias)
        shifted = layer(x) - before
    wanted = torch.zeros_like(expected) if base_bias is None else expected
    torch.testing.assert_close(shifted, wanted.expand(1, 3, -1), rtol=0, atol=1e-12 * float(before.abs().max()))


def test_every_method_of_peft_is_known() -> None:
    tables = [set(METHODS), set(ELSEWHERE), set(REFUSED_AT_SITES), set(REFUSED_METHODS)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {kind.value for kind in PeftType} <= set().union(*tables)


def test_every_method_that_is_folded_is_tested() -> None:
    tested = {method for method, _ in KINDS.values()}
    # Of PEFT before 0.19; later ones read it as MiSS.
    assert set(METHODS) - tested == {"BONE"}
    assert set(METHODS) <= set(MARKERS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "OLoRA"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"use_qalora": True}, "QALoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "Megatron"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layers that its base does not have"),
        ({"target_parameters": ["self_attn.o_proj.weight"]}, "target_parameters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_a_lora_that_is_none(changes: dict[str, Any], says: str, part: BasePart, tmp_path: Path) -> None:
    directory = rewrite_config(save_adapter(config_of("lora"), tmp_path / "adapter"), **changes)
    with pytest.raises(UnsupportedError, match=says):
        folds_of(directory, part)


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", True, False])
def test_starts_that_leave_the_base_alone_are_plain(start: Any, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("lora"), tmp_path / "adapter")
    expected = folds_of(directory, part)
    folds = folds_of(rewrite_config(directory, init_lora_weights=start), part)
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(folds, expected, strict=True))


def test_what_changes_the_base_elsewhere_leaves_the_fold_exact(part: BasePart, tmp_path: Path) -> None:
    directory = rewrite_config(save_adapter(config_of("elsewhere"), tmp_path / "adapter"), init_lora_weights="pissa")
    assert folds_of(directory, part).shares_base


@pytest.mark.parametrize("method", [*sorted(REFUSED_METHODS), "TOMORROW"])
def test_refuses_a_method_by_name(method: str, part: BasePart, tmp_path: Path) -> None:
    directory = rewrite_config(save_adapter(config_of("elsewhere"), tmp_path / "adapter"), peft_type=method)
    with pytest.raises(UnsupportedError, match=f"of the method {method}, which .*Merge it"):
        folds_of(directory, part)


@pytest.mark.parametrize("method", sorted(REFUSED_AT_SITES))
def test_refuses_a_method_at_a_locked_projection(method: str, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("lora"), tmp_path / "adapter")
    marker = MARKERS[method][0]
    rewrite_tensors(directory, lambda tensors: {key.replace("lora_", marker): t for key, t in tensors.items()})
    rewrite_config(directory, peft_type=method)
    with pytest.raises(UnsupportedError, match=f"of the method {method}, which"):
        folds_of(directory, part)
    rewrite_tensors(directory, lambda tensors: {key: t for key, t in tensors.items() if "o_proj" not in key})
    assert folds_of(directory, part).shares_base


def test_prompts_leave_projections_alone(part: BasePart, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig

    for i, cls in enumerate((PromptTuningConfig, PrefixTuningConfig)):
        directory = save_adapter(cls(task_type="CAUSAL_LM", num_virtual_tokens=3), tmp_path / str(i))
        folds = folds_of(directory, part)
        assert folds.shares_base
        assert folds.gap == 0


def test_adalora_whose_ranks_were_cut(base: Path, part: BasePart, tmp_path: Path) -> None:
    path = "model.layers.{}.self_attn.o_proj"
    masks = {path.format(0): [True, False] * 4, path.format(2): [False] * 8}
    directory = save_adapter(config_of("adalora", target_modules=["o_proj"]), tmp_path / "adapter")

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        cut_ones = {}
        for key, tensor in tensors.items():
            mask = next((mask for path, mask in masks.items() if f"{path}." in key), [True] * 8)
            cut_ones[key] = tensor[:, mask] if key.endswith("lora_B") else tensor[mask]
        return {key: tensor.contiguous() for key, tensor in cut_ones.items()}

    rewrite_tensors(directory, cut)
    rewrite_config(directory, rank_pattern={f"{path}.lora_E": mask for path, mask in masks.items()})
    model = loaded(base, directory)
    for fold in folds_of(directory, part):
        expected = shift(layer_of(model, fold.layer), part.displacements[fold.layer].dense(128))
        torch.testing.assert_close(fold.bias, expected, rtol=1e-12, atol=1e-13)
    assert folds_of(directory, part).folds[1].gap == 0  # no rank is left there


def test_a_bias_of_the_adapter_stands_in_for_the_bases(part: BasePart, tmp_path: Path) -> None:
    """`bias: "all"` over a base with biases: PEFT loads the adapter's over a lock in the base's."""
    key = "base_model.model.model.layers.0.self_attn.o_proj.base_layer.bias"
    directory = save_adapter(config_of("lora"), tmp_path / "adapter")
    plain = folds_of(directory, part)
    rewrite_tensors(directory, lambda tensors: tensors | {key: torch.ones(64)})
    folds = folds_of(directory, part)
    assert [fold.action for fold in folds] == ["replaced", "added"]
    assert torch.equal(folds.folds[0].bias, plain.folds[0].bias)
    assert not folds.shares_base


def test_says_what_to_install(part: BasePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_adapter(config_of("loha"), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(FastlockError, match=r"PEFT is not installed.*fastlock\[adapters\]"):
        folds_of(directory, part)


def test_reads_a_lora_without_peft(part: BasePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_adapter(config_of("lora"), tmp_path / "adapter")
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert folds_of(directory, part).gap > 0.1


def test_the_random_numbers_of_others_go_on(part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("loha"), tmp_path / "adapter")
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    folds_of(directory, part)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("kind", ["vera", "loha", "ia3 of the output", "adalora"])
@pytest.mark.parametrize("scaling", ["sglang", "llama.cpp"])
def test_other_stacks_serve_loras_alone(kind: str, scaling: Any, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of(kind), tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="only PEFT and transformers serve"):
        folds_of(directory, part, scaling=scaling)


@pytest.mark.parametrize("kind", ["dora", "vera", "adalora", "ia3 of the input", "loha", "modules to save", "boft"])
def test_refuses_an_adapter_of_another_base(kind: str, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of(kind), tmp_path / "adapter", hidden_size=48, head_dim=16)
    with pytest.raises((MismatchError, DamagedError), match="o_proj"):
        folds_of(directory, part)
