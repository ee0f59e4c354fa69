"""What a fold of an adapter says beside its numbers: scales, gaps, digests, and what of the base is read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastlock.checkpoints.adapters.adapter import ADAPTER_WEIGHTS
from fastlock.checkpoints.adapters.folding import BasePart, adapted_site, base_part, fold_adapter
from fastlock.checkpoints.adapters.methods.lora import lora_operands
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.errors import DamagedError, FastlockError
from fastlock.storage.files import InMemoryFile
from fastlock.storage.places import files_in
from tests.helpers.adapters import (
    adapted,
    base_model,
    config_of,
    layer_of,
    loaded,
    read_adapter,
    rewrite_config,
    save_adapter,
    shift,
)
from tests.helpers.families import logits, random_lock, tiny_gemma3, tiny_model, tokens
from tests.helpers.quantised import gptq

SITE = "base_model.model.model.layers.{}.self_attn.o_proj"


def fold(directory: Path, part: BasePart, **keys: Any) -> Any:
    return fold_adapter(read_adapter(directory), part.checkpoint, part.lock, part=part, **keys)


RULES = [
    ("lora", {}, "peft", 12 / 4, 12 / 4),
    ("lora", {}, "sglang", 12 / 4, 12 / 4),
    ("lora", {}, "llama.cpp", 12 / 4, 12 / 4),
    ("rslora", {}, "peft", 12 / 2, 12 / 2),
    ("rslora", {}, "sglang", 12 / 4, 12 / 4),
    ("rslora", {}, "llama.cpp", 12 / 4, 12 / 4),
    ("patterns", {}, "peft", 5 / 8, 7 / 2),
    ("patterns", {}, "sglang", 12 / 4, 12 / 4),
    ("patterns", {}, "llama.cpp", 12 / 8, 12 / 2),
    ("lora", {"lora_alpha": 0}, "llama.cpp", 1.0, 1.0),
]


@pytest.mark.parametrize(("kind", "change", "scaling", "first", "last"), RULES, ids=str)
def test_follows_the_scale_rule_of_a_stack(
    kind: str, change: dict[str, Any], scaling: str, first: float, last: float, part: BasePart, tmp_path: Path
) -> None:
    directory = rewrite_config(save_adapter(config_of(kind), tmp_path / "adapter"), **change)
    tensors = {key: t.double() for key, t in safetensors.torch.load_file(directory / ADAPTER_WEIGHTS).items()}
    for f, s in zip(fold(directory, part, scaling=scaling), (first, last), strict=True):
        a, b = (tensors[f"{SITE.format(f.layer)}.lora_{name}.weight"] for name in "AB")
        expected = f.base_part + s * (b @ (a @ part.displacements[f.layer].dense(128)))
        torch.testing.assert_close(f.bias, expected, rtol=1e-12, atol=1e-13)
        assert f.scale == s
        if kind == "rslora":
            assert f.peft_scale == 6


def test_an_unknown_scale_rule_is_refused(part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("lora"), tmp_path / "adapter")
    with pytest.raises(FastlockError, match="must be one of 'peft', 'sglang', 'llama.cpp'"):
        fold(directory, part, scaling="tgi")


def test_the_gap_is_how_far_the_bases_fold_is(part: BasePart, tmp_path: Path) -> None:
    folds = fold(save_adapter(config_of("lora"), tmp_path / "adapter"), part)
    squares = [(float((f.bias - f.base_part).square().sum()), float(f.base_part.square().sum())) for f in folds]
    for f, (apart, whole) in zip(folds, squares, strict=True):
        assert f.gap == pytest.approx(math.sqrt(apart / whole))
    assert folds.gap == pytest.approx(math.sqrt(sum(a for a, _ in squares) / sum(w for _, w in squares)))


def test_without_a_displacement_there_is_no_gap(part: BasePart, tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(config_of("lora"), tmp_path / "adapter"))
    assert fold_adapter(adapter, part.checkpoint, part.lock, 0.0).gap == 0


def test_keeps_the_digests_of_what_it_read(base: Path, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("lora"), tmp_path / "adapter")
    tensors = safetensors.torch.load_file(directory / ADAPTER_WEIGHTS)
    weights = safetensors.torch.load_file(base / "model.safetensors")
    for f in fold(directory, part):
        data = b"".join(tensors[f"{SITE.format(f.layer)}.lora_{name}.weight"].numpy().tobytes() for name in "AB")
        assert f.digest == hashlib.sha256(data).digest()
        heads = part.displacements[f.layer].heads
        w = weights[f"model.layers.{f.layer}.self_attn.o_proj.weight"].view(64, 4, 32)
        assert f.base_digest == hashlib.sha256(w[:, heads].numpy().tobytes()).digest()


def test_reads_the_base_once_for_many_adapters(base: Path, tmp_path: Path) -> None:
    """Each further LoRA over a base reads its own config, header, and A and B of the locked layers, once."""
    part = base_part(Checkpoint(files_in(base), str(base)), random_lock(tiny_model("llama")))
    adapter = read_adapter(save_adapter(config_of("lora"), tmp_path / "adapter"))
    reads: list[tuple[str, int]] = []

    class Counted(InMemoryFile):
        def read(self, start: int, length: int) -> bytes:
            reads.append(("base", length))
            return super().read(start, length)

    for name in part.checkpoint.files:
        part.checkpoint.files[name] = Counted(b"")
    sizes = [t.length for f in (0, 2) for t in adapter.modules[f"model.layers.{f}.self_attn.o_proj"].values()]
    read = type(adapter).read
    seen = []

    def counted(self: Any, tensor: Any, whole_numbers: bool = False) -> torch.Tensor:
        seen.append(tensor.length)
        return read(self, tensor, whole_numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(adapter), "read", counted)
        fold_adapter(adapter, part.checkpoint, part.lock, part=part)
    assert reads == []
    assert sorted(seen) == sorted(sizes)


def test_the_operands_of_a_lora_are_its_own(part: BasePart, tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(config_of("rslora"), tmp_path / "adapter"))
    at = adapted_site(adapter, part, part.sites[0])
    operands = lora_operands(at)
    assert (operands.a.shape, operands.b.shape, operands.scale) == ((4, 128), (64, 4), 6.0)
    assert adapted_site(read_adapter(save_adapter(config_of("elsewhere"), tmp_path / "b")), part, part.sites[0]) is None


@pytest.mark.parametrize("kind", ["lora bias", "dora", "ia3 of the output", "modules to save", "elsewhere"])
def test_a_model_with_the_folds_is_the_model_with_d_added(
    kind: str, base: Path, part: BasePart, tmp_path: Path
) -> None:
    directory = save_adapter(config_of(kind), tmp_path / "adapter")
    ids, folds = tokens(), fold(directory, part)
    model, expected = loaded(base, directory), None
    before = logits(model, ids)
    for add_in_front in (True, False):
        hooks = []
        for f in folds:
            layer, d = layer_of(model, f.layer), part.displacements[f.layer].dense(128)
            hooks += [
                layer.register_forward_pre_hook(lambda _, args, d=d: (args[0] + d, *args[1:]))
                if add_in_front
                else layer.register_forward_hook(lambda _, args, out, f=f: out + f.bias)
            ]
        result = logits(model, ids)
        for hook in hooks:
            hook.remove()
        expected = result if expected is None else expected
    assert float((expected - before).abs().max()) > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def test_folds_in_a_family_that_transposes_its_weights(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "gpt2")
    part = base_part(Checkpoint(files_in(base), str(base)), random_lock(tiny_model("gpt2")))
    kinds = {
        "lora": ("LORA", {"fan_in_fan_out": True}),
        "dora": ("LORA", {"fan_in_fan_out": True, "use_dora": True}),
        "ia3": ("IA3", {"fan_in_fan_out": True, "feedforward_modules": []}),
        "vera": ("VERA", {"fan_in_fan_out": True, "r": 8, "save_projection": False}),
        "own": ("LORA", {"fan_in_fan_out": True, "target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj"]}),
    }
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, (method, keys) in kinds.items():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[method](**{"target_modules": ["attn.c_proj", "c_attn"], **keys})
        directory = save_adapter(config, tmp_path / kind, "gpt2")
        model = loaded(base, directory)
        for f in fold(directory, part):
            layer = next(m for name, m in model.named_modules() if name.endswith(f"h.{f.layer}.attn.c_proj"))
            expected = shift(layer, part.displacements[f.layer].dense(64))
            torch.testing.assert_close(f.bias, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_folds_in_a_decoder_inside_a_larger_model(tmp_path: Path) -> None:
    tiny_gemma3().save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(files_in(tmp_path / "base"), "base")
    part = base_part(checkpoint, random_lock(tiny_gemma3()))
    # A pattern, as the vision tower has projections of the same name in some releases.
    config = config_of("lora", target_modules=r".*language_model.*\.o_proj")
    model = adapted(config, tiny_gemma3())
    model.save_pretrained(tmp_path / "adapter")
    folds = fold(tmp_path / "adapter", part)
    for f in folds:
        assert f.touched
        layer = next(m for n, m in model.double().named_modules() if n.endswith(f"layers.{f.layer}.self_attn.o_proj"))
        width = f.site.num_heads * f.site.head_dim
        expected = shift(layer, part.displacements[f.layer].dense(width))
        torch.testing.assert_close(f.bias, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_experts_may_have_other_names_in_the_files(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "mixtral")
    part = base_part(Checkpoint(files_in(base), str(base)), random_lock(tiny_model("mixtral")))
    folds = fold(
        save_adapter(config_of("lora", target_modules=["o_proj", "gate"]), tmp_path / "adapter", "mixtral"), part
    )
    assert any(path.endswith(".gate") for path in folds.adapter.modules)
    assert all(f.touched for f in folds)


def test_rows_of_the_embedding_change_no_projection(part: BasePart, tmp_path: Path) -> None:
    plain = fold(save_adapter(config_of("lora"), tmp_path / "plain"), part)
    with_rows = fold(save_adapter(config_of("lora", trainable_token_indices=[3, 4]), tmp_path / "rows"), part)
    assert "model.embed_tokens" in with_rows.adapter.modules
    assert [f.action for f in with_rows] == [f.action for f in plain] == ["added", "added"]


def test_a_base_that_holds_no_numbers_is_refused(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "base"
    broken.mkdir()
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].fill_(float("inf"))
    safetensors.torch.save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedError, match="its locked columns hold NaN or infinite"):
        base_part(Checkpoint(files_in(broken), str(broken)), random_lock(tiny_model("llama")))


def test_over_a_quantised_base_folds_what_is_served(base: Path, tmp_path: Path) -> None:
    """A QLoRA: W is the dequantised one, for methods that take the whole of it, too."""
    directory = tmp_path / "base"
    directory.mkdir()
    config = json.loads((base / "config.json").read_text())
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    dense = {}
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj"
        packed, config["quantization_config"], dense[layer] = gptq(64, 128, act_order=True, seed=layer)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    part = base_part(Checkpoint(files_in(directory), str(directory)), random_lock(tiny_model("llama")))
    for kind in ("lora", "dora", "ia3 of the input"):
        adapter = save_adapter(config_of(kind), tmp_path / kind)
        model = loaded(base, adapter)
        for f in fold(adapter, part):
            layer = layer_of(model, f.layer)
            layer.get_base_layer().weight.data = dense[f.layer]
            expected = shift(layer, part.displacements[f.layer].dense(128))
            torch.testing.assert_close(f.bias, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
