"""Quantised checkpoints on disk: relocked, verified, unlocked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlock
from fastlock.checkpoints.layout import NEW_SHARD
from tests.checkpoints.quantised.test_formats import FORMATS
from tests.checkpoints.test_relocking import contents
from tests.helpers import quantised
from tests.helpers.families import random_lock, tiny_model

LAYERS, LOCKED = 3, (0, 2)


def checkpoint(
    tmp_path: Path, write, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes
) -> tuple[Path, fastlock.Lock, dict[int, torch.Tensor]]:
    """A checkpoint whose output projections are quantised; the lock, and W of each layer in float64."""
    model = tiny_model(kind, dtype, **changes)
    lock = random_lock(model)
    directory = tmp_path / "source"
    model.save_pretrained(directory)
    tensors, dense, config = load_file(directory / "model.safetensors"), {}, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.o_proj"
        hidden, width = tensors.pop(f"{name}.weight").shape
        written, config, dense[layer] = write(hidden, width, seed=layer)
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in written.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, quantization_config=config)
    return directory, lock, dense


def edit(directory: Path, **keys) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def folded(dense: torch.Tensor, lock: fastlock.Lock, layer: int, strength: float) -> torch.Tensor:
    """W d, from the lock's own numbers."""
    d = torch.zeros(dense.shape[1], dtype=torch.float64)
    head_dim = lock.directions.shape[1]
    for i, (of_layer, head) in enumerate(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)):
        if of_layer == layer:
            shift = strength * float(lock.scales[i]) * lock.directions[i].double()
            d[head * head_dim : (head + 1) * head_dim] += shift
    return dense @ d


@pytest.mark.parametrize("name", FORMATS)
def test_its_biases_are_the_folds_of_the_served_weights(name: str, tmp_path) -> None:
    write, tolerance = FORMATS[name]
    if name == "gptq one group":
        tolerance = 0
    source, lock, dense = checkpoint(tmp_path, write)
    before = contents(source)
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    added = load_file(tmp_path / "out" / NEW_SHARD)
    for layer in range(LAYERS):
        bias = added.pop(f"model.layers.{layer}.self_attn.o_proj.bias")
        assert bias.dtype == torch.bfloat16
        if layer not in LOCKED:
            assert not bias.any()
            continue
        expected = folded(dense[layer], lock, layer, 6.0)
        error = (bias.double() - expected).abs()
        size = folded(
            dense[layer].abs(), fastlock.Lock(lock.layers, lock.heads, lock.directions.abs(), lock.scales), layer, 6.0
        )
        assert bool((error <= expected.abs() * 2.0**-8 + (tolerance + 1e-12) * 10 * size.max()).all())
        assert bias.any()
    assert {name.split(".")[-2] for name in added} == {"q_proj", "k_proj", "v_proj"}, "vLLM would not initialise them"
    assert not any(bias.any() for bias in added.values())
    assert receipt.dtype == "bfloat16"
    assert fastlock.verify(tmp_path / "out", lock).strength == 6.0
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before == contents(source)


@pytest.mark.parametrize("suffix", ["qweight", "scales", "qzeros"])
def test_verify_notices_that_the_weights_were_changed(suffix: str, tmp_path) -> None:
    source, lock, _ = checkpoint(tmp_path, quantised.gptq)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", copy=True)
    (shard,) = (path for path in (tmp_path / "out").glob("model-fastlock-*.safetensors"))
    tensors = load_file(shard)
    changed = tensors[f"model.layers.0.self_attn.o_proj.{suffix}"]
    changed.add_(changed[:1].clone().fill_(1))
    save_file(tensors, shard, metadata={"format": "pt"})
    assert fastlock.verify(tmp_path / "out", lock).state == "altered"


def test_attention_that_was_left_alone_is_folded_as_ever(tmp_path) -> None:
    """By the tensors, not by the config: fbgemm, gpt-oss and `modules_to_not_convert` leave it in 16 bits."""
    model = tiny_model("llama", torch.bfloat16)
    lock = random_lock(model)
    model.save_pretrained(tmp_path / "source")
    edit(tmp_path / "source", quantization_config={"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["o_proj"]})
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")
    fastlock.relock(model, lock)
    added = load_file(tmp_path / "out" / NEW_SHARD)
    for layer in LOCKED:
        name = f"model.layers.{layer}.self_attn.o_proj"
        assert torch.equal(added[f"{name}.bias"], model.get_submodule(name).bias)


def test_the_zeros_that_autogptq_wrote_as_biases(tmp_path) -> None:
    """For every projection, though the config says that there are none; fastlock would refuse any other numbers."""
    source, lock, dense = checkpoint(tmp_path, quantised.gptq)
    tensors = load_file(source / "model.safetensors")
    zeros = {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": torch.zeros(size, dtype=torch.float16)
        for layer in range(LAYERS)
        for name, size in (("q", dense[0].shape[1]), ("o", dense[0].shape[0]))
    }
    save_file(tensors | zeros, source / "model.safetensors", metadata={"format": "pt"})
    before = contents(source)
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    assert receipt.dtype == "float16"
    assert fastlock.verify(tmp_path / "out", lock)
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    zeros["model.layers.1.self_attn.q_proj.bias"][3] = 1
    save_file(tensors | zeros, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastlock.DamagedError, match="biases that its config switches off"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "again")


def test_in_llama_form(tmp_path) -> None:
    source, lock, dense = checkpoint(tmp_path, quantised.gptq, "mistral")
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == json.loads((source / "config.json").read_text())["quantization_config"]
    assert fastlock.verify(tmp_path / "out", lock)
    assert len(dense) == LAYERS


@pytest.mark.parametrize(
    "config",
    [
        {"transform_config": {"config_groups": {"R2": {"type": "hadamard"}}}},
        {"transforms_config": {"R1": {}, "R2": {"apply": []}}},
        {"meta": {"rotation": "hadamard"}},
    ],
)
def test_heads_that_were_rotated_are_refused(config: dict, tmp_path) -> None:
    source, lock, _ = checkpoint(tmp_path, quantised.gptq)
    before = contents(source)
    edit(source, quantization_config=json.loads((source / "config.json").read_text())["quantization_config"] | config)
    for look in (
        lambda: fastlock.relock_checkpoint(source, lock, tmp_path / "out"),
        lambda: fastlock.doctor(source),
        lambda: fastlock.verify(source, lock),
    ):
        with pytest.raises(fastlock.UnsupportedError, match="its heads were rotated, and a lock would pull somewhere"):
            look()
    assert not (tmp_path / "out").exists()
    assert contents(source).keys() == before.keys()


def test_awq_of_a_model_without_grouped_queries_is_refused(tmp_path) -> None:
    source, lock, _ = checkpoint(tmp_path, quantised.awq, num_key_value_heads=4)
    with pytest.raises(
        fastlock.UnsupportedError, match="AWQ scales the heads of models without grouped-query attention"
    ):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_would_not_read_is_refused(tmp_path) -> None:
    source, lock, _ = checkpoint(tmp_path, quantised.gptq)
    with pytest.raises(fastlock.UnsupportedError, match="llama.cpp runs GGUF alone"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", stacks=["llama.cpp"])


def test_a_strength_that_is_too_large_for_the_dtype(tmp_path) -> None:
    """Its fold is finite in float64."""
    source, lock, _ = checkpoint(tmp_path, quantised.gptq)
    edit(source, dtype="float16", torch_dtype="float16")
    with pytest.raises(fastlock.FastlockError, match="not finite in torch.float16: the strength is too large"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", 1e7)
    assert not (tmp_path / "out").exists()


def test_other_scales_of_the_same_weights_are_folded_anew(tmp_path) -> None:
    """Folds that were made before are known by all tensors of a projection: here two checkpoints share one's file."""
    source, lock, _ = checkpoint(tmp_path, quantised.gptq)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".scales")}
    shards = {"scales.safetensors": scales, "others.safetensors": {k: v for k, v in tensors.items() if k not in scales}}
    for shard, held in shards.items():
        save_file(held, source / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "others.safetensors").unlink()
    (other / "others.safetensors").hardlink_to(source / "others.safetensors")
    save_file({name: 2 * tensor for name, tensor in scales.items()}, other / "scales.safetensors")
    folds: dict = {}
    for directory in (source, other):
        fastlock.relock_checkpoint(directory, lock, tmp_path / f"{directory.name}-out", folds=folds)
        assert fastlock.verify(tmp_path / f"{directory.name}-out", lock)
    assert len(folds) == 2 * len(LOCKED)


def test_relocking_it_again_starts_from_the_original(tmp_path) -> None:
    source, lock, _ = checkpoint(tmp_path, quantised.awq)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    fastlock.relock_checkpoint(tmp_path / "out", lock, tmp_path / "again", 2.0)
    fastlock.relock_checkpoint(source, lock, tmp_path / "direct", 2.0)
    assert load_file(tmp_path / "again" / NEW_SHARD).keys() == load_file(tmp_path / "direct" / NEW_SHARD).keys()
    for name, bias in load_file(tmp_path / "again" / NEW_SHARD).items():
        assert torch.equal(bias, load_file(tmp_path / "direct" / NEW_SHARD)[name])
