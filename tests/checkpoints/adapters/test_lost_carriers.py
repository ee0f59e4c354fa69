"""Tempting places for a lock in an adapter that loses it, most of them in silence: why there are other carriers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.checkpoints.adapters.folding import BasePart, fold_adapter
from tests.helpers.adapters import (
    config_of,
    layer_of,
    loaded,
    read_adapter,
    rewrite_config,
    rewrite_tensors,
    save_adapter,
    shift,
)
from tests.helpers.families import logits, tokens
from tests.helpers.relocked_adapters import adapted_logits, displaced_logits

PATH = "base_model.model.model.layers.{}.self_attn.o_proj."
HERE = {"stacks": ["transformers"]}


def folds(adapter: Path, part: BasePart) -> dict[int, torch.Tensor]:
    """f of each locked layer."""
    return {f.layer: f.bias.float() for f in fold_adapter(read_adapter(adapter), part.checkpoint, part.lock, part=part)}


def test_biases_without_lora_bias_are_dropped(base: Path, part: BasePart, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    plain = adapted_logits(base, source)
    fastlock.relock_adapter(source, base, part.lock, tmp_path / "out", **HERE)
    assert (adapted_logits(base, tmp_path / "out") - plain).abs().max() > 0.1
    rewrite_config(tmp_path / "out", lora_bias=False)
    assert torch.equal(adapted_logits(base, tmp_path / "out"), plain)
    found = fastlock.verify(tmp_path / "out", part.lock)
    assert found.state == "altered"
    assert "does not set lora_bias" in found.reason


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"bias": "lora_only"}, "base_layer.bias"), ({"bias": "all"}, "base_layer.bias"), ({"bias": "all"}, "bias")],
    ids=str,
)
def test_biases_of_the_base_layer_are_dropped_where_it_has_none(
    changes: dict[str, str], name: str, base: Path, part: BasePart, tmp_path: Path
) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    plain, truth = adapted_logits(base, source), displaced_logits(base, source, part.lock)
    biases = {PATH.format(layer) + name: f for layer, f in folds(source, part).items()}
    rewrite_tensors(rewrite_config(source, **changes), lambda tensors: tensors | biases)
    assert torch.equal(adapted_logits(base, source), plain)
    assert (truth - plain).abs().max() > 0.1


def test_a_projection_of_its_own_loses_its_bias_where_the_base_has_none(
    base: Path, part: BasePart, tmp_path: Path
) -> None:
    source = save_adapter(config_of("modules to save"), tmp_path / "adapter")
    plain, truth = adapted_logits(base, source), displaced_logits(base, source, part.lock)
    biases = {PATH.format(layer) + "bias": f for layer, f in folds(source, part).items()}
    rewrite_tensors(source, lambda tensors: tensors | biases)
    assert torch.equal(adapted_logits(base, source), plain)
    assert (truth - plain).abs().max() > 0.1


def test_without_zeros_for_the_other_targets_lean_loading_fails(base: Path, part: BasePart, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    out = tmp_path / "out"
    fastlock.relock_adapter(source, base, part.lock, out, **HERE)
    rewrite_tensors(out, lambda tensors: {key: t for key, t in tensors.items() if "bias" not in key or t.any()})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="meta"):
        peft.PeftModel.from_pretrained(model, out, low_cpu_mem_usage=True).float()(tokens())


def test_a_receipt_in_the_config_is_gone_once_peft_saves(base: Path, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    rewrite_config(source, fastlock={"strength": 6.0})
    with pytest.warns(UserWarning, match="fastlock"):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), source)
    model.save_pretrained(tmp_path / "again")
    assert "fastlock" not in json.loads((tmp_path / "again" / "adapter_config.json").read_text())


def test_the_adapters_own_fold_in_the_bases_bias_is_scaled_again(base: Path, part: BasePart, tmp_path: Path) -> None:
    """IA3 scales the base's bias with the rest: W d belongs there, and f does not."""
    source = save_adapter(config_of("ia3 of the output"), tmp_path / "adapter")
    model, width = loaded(base, source), 4 * 32
    for layer, displacement in part.displacements.items():
        module = layer_of(model, layer)
        truth = shift(module, displacement.dense(width))
        weight = module.get_base_layer().weight
        of_base = weight @ displacement.dense(width)
        for bias, exact in ((of_base, True), (truth, False)):
            module.get_base_layer().bias = torch.nn.Parameter(bias.detach())
            with torch.no_grad():
                found = module(torch.zeros(1, width, dtype=torch.float64))[0]
            assert torch.allclose(found, truth, rtol=1e-9, atol=1e-9) == exact
            module.get_base_layer().bias = None


def test_a_relocked_base_under_an_adapter_that_touches_its_projections_is_not_exact(
    base: Path, part: BasePart, tmp_path: Path
) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    fastlock.relock_checkpoint(base, part.lock, tmp_path / "locked")
    truth, plain = displaced_logits(base, source, part.lock), adapted_logits(base, source)
    over = adapted_logits(tmp_path / "locked", source)
    assert (over - truth).abs().max() > 0.05 * (truth - plain).abs().max()
    found = fastlock.verify(source, part.lock, base=tmp_path / "locked")
    assert (found.state, found.altered) == ("altered", (0, 2))


def test_merging_a_bias_over_a_base_without_one_is_refused_by_peft(base: Path, part: BasePart, tmp_path: Path) -> None:
    source: Any = save_adapter(config_of("lora"), tmp_path / "adapter")
    fastlock.relock_adapter(source, base, part.lock, tmp_path / "out", **HERE)
    with pytest.raises(RuntimeError, match="because the base layer has no bias"):
        loaded(base, tmp_path / "out").merge_and_unload()
    assert logits(loaded(base, tmp_path / "out"), tokens()).isfinite().all()
