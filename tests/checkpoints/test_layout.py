"""Nobody writes to the source through what fastlock made, and nothing beside the lock loads without it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import fastlock
from fastlock.checkpoints.layout import ASIDE, NEW_SHARD
from tests.helpers.families import logits, random_lock, reload, tiny_model, tokens, word_tokenizer


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def made(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    word_tokenizer(fastlock.shipped_pairs()[:4]).save_pretrained(tmp_path / "source")
    return model, random_lock(model), tmp_path / "source"


def write_everything_in_place(directory: Path) -> None:
    """As the rudest saver would: into the files that are there, under every name that a saver uses."""
    for path in [*directory.rglob("*.json"), *directory.glob("*.txt"), *directory.glob("model*.safetensors")]:
        if "fastlock" not in path.name and "fastlock" not in path.parts:
            with path.open("r+b") as file:
                file.write(b"changed")
    for number in range(1, 10):
        with (directory / f"model-0000{number}-of-00009.safetensors").open("ab") as file:
            file.write(b"changed")


@pytest.mark.parametrize("again", ["relocked", "relocked twice", "unlocked"])
def test_what_savers_write_never_reaches_the_source(made, again: str, tmp_path) -> None:
    _, lock, source = made
    before = contents(source)
    out = tmp_path / "relocked"
    fastlock.relock_checkpoint(source, lock, out, 6.0)
    if again == "relocked twice":
        fastlock.relock_checkpoint(out, lock, tmp_path / "twice", 3.0)
        out = tmp_path / "twice"
    elif again == "unlocked":
        relocked = contents(out)
        fastlock.unlock_checkpoint(out, tmp_path / "unlocked")
        write_everything_in_place(tmp_path / "unlocked")
        assert contents(out) == relocked
        out = tmp_path / "unlocked"
    write_everything_in_place(out)
    assert contents(source) == before


def test_what_transformers_saves_there_never_reaches_the_source(made, tmp_path) -> None:
    _, lock, source = made
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    assert any(path.samefile(other) for path in source.glob("*.safetensors") for other in (tmp_path / "out").iterdir())
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    config.max_new_tokens = 3
    config.save_pretrained(tmp_path / "out")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    tuned.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    assert contents(source) == before


def test_version_control_and_caches_stay_with_the_source(made, tmp_path) -> None:
    """A commit in the relocked directory must not write to the source's repository; in place, both stay."""
    _, lock, source = made
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    (source / ".cache" / "huggingface").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "model.bin").write_bytes(b"x")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    assert not (tmp_path / "out" / ".git").exists()
    assert not (tmp_path / "out" / ".cache").exists()
    fastlock.relock_checkpoint(source, lock, source, 6.0, in_place=True)
    assert (source / ".git" / "HEAD").is_file()
    assert (source / ".cache" / "huggingface" / "model.bin").is_file()
    fastlock.unlock_checkpoint(source, source, in_place=True)
    assert contents(source) == before


def test_in_place_a_file_that_others_have_too_is_copied(made, tmp_path) -> None:
    _, lock, source = made
    os.link(source / "tokenizer.json", tmp_path / "other")
    fastlock.relock_checkpoint(source, lock, source, 6.0, in_place=True)
    assert not (source / "tokenizer.json").samefile(tmp_path / "other")


@pytest.mark.parametrize("shard", ["model.safetensors", "model-00001-of-00002.safetensors", "part.safetensors"])
def test_names_come_back(shard: str, tmp_path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    source = tmp_path / "source"
    model.save_pretrained(source)
    if shard != "model.safetensors":
        tensors = load_file(source / "model.safetensors")
        (source / "model.safetensors").rename(source / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    before = contents(source)
    fastlock.relock_checkpoint(source, random_lock(model), tmp_path / "out")
    assert not (tmp_path / "out" / shard).exists()
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


BESIDE = ["adapter_config.json", "checkpoint-100/model.safetensors", "original/consolidated.00.pth", "model.gguf"]


@pytest.mark.parametrize("name", BESIDE)
def test_what_loads_without_the_lock_is_set_aside_and_comes_back(name: str, made, tmp_path) -> None:
    model, lock, source = made
    (source / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        model.save_pretrained((source / name).parent)
        (source / name).with_name("optimizer.pt").write_bytes(b"x")
    else:
        (source / name).write_text("{}")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    assert not (tmp_path / "out" / name).exists()
    if "/" in name:
        assert not (tmp_path / "out" / name).parent.exists(), "whole directories, so that a run can be resumed there"
    assert (tmp_path / "out" / ASIDE / name).is_file()
    fastlock.relock(model, lock, 6.0)
    assert torch.equal(logits(reload(tmp_path / "out"), tokens()), logits(model, tokens()))
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("name", BESIDE)
def test_what_was_put_beside_the_lock_is_named(name: str, made, tmp_path) -> None:
    _, lock, source = made
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 6.0)
    assert fastlock.verify(tmp_path / "out", lock)
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("{}")
    found = fastlock.verify(tmp_path / "out", lock)
    assert (found.state, name in found.reason) == ("altered", True)
    assert all(not finding.acts and name in finding.reason for finding in fastlock.doctor(tmp_path / "out"))


def packed(source: Path, gptq: bool) -> None:
    """q, k, v and the MLP as GPTQ or compressed-tensors keep them; the output projection as it was."""
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "self_attn" in name or "mlp" in name]:
        if "o_proj" in name:
            continue
        weight, module = tensors.pop(name), name.removesuffix("weight")
        rows, columns = weight.shape
        if gptq:
            tensors[f"{module}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            tensors[f"{module}scales"] = torch.ones(1, rows)
        else:
            tensors[f"{module}weight_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
            tensors[f"{module}weight_scale"] = torch.ones(rows, 1)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("gptq", [True, False])
def test_modules_are_known_by_their_tensors(gptq: bool, tmp_path) -> None:
    """The flag asks for biases of q, k and v, and vLLM leaves those that it does not find uninitialised."""
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    packed(tmp_path / "source", gptq)
    fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
    added = load_file(tmp_path / "out" / NEW_SHARD)
    config = model.config
    lengths = {"q": config.num_attention_heads * 32, "o": config.hidden_size}
    lengths |= dict.fromkeys("kv", config.num_key_value_heads * 32)
    assert {name: tuple(bias.shape) for name, bias in added.items()} == {
        f"model.layers.{layer}.self_attn.{letter}_proj.bias": (length,)
        for layer in range(config.num_hidden_layers)
        for letter, length in lengths.items()
    }


def renamed(source: Path, prefix: str) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, source / "model.safetensors")


def pointer(source: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"
    (source / "model.safetensors").write_text(text)


def fewer_layers(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


def other_dtype(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data.replace(b'"BF16"', b'"BQ16"'))


def given_twice(source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"hidden_size": 64,', 1))


def bitsandbytes(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.zeros(8)
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "kind", "remedy"),
    [
        (lambda source: renamed(source, "_orig_mod."), fastlock.UnsupportedError, "named as torch.compile names it"),
        (lambda source: renamed(source, "module."), fastlock.UnsupportedError, "named as DataParallel or DDP names it"),
        (lambda source: renamed(source, "base_model.model."), fastlock.UnsupportedError, "named as PEFT names it"),
        (pointer, fastlock.DamagedError, "git lfs pull"),
        (fewer_layers, fastlock.DamagedError, "hold 3 layers.*its config says 2"),
        (other_dtype, fastlock.FastlockError, "'BQ16' is a dtype that safetensors does not know"),
        (given_twice, fastlock.FastlockError, "'hidden_size' twice"),
        (bitsandbytes, fastlock.UnsupportedError, "is quantised, and its tensors are of no format"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_right_remedy(change, kind, remedy: str, tmp_path) -> None:
    """By relock, verify and doctor alike."""
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    change(tmp_path / "source")
    lock = random_lock(model)
    for look in (
        lambda: fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out"),
        lambda: fastlock.verify(tmp_path / "source", lock),
        lambda: fastlock.doctor(tmp_path / "source"),
    ):
        with pytest.raises(kind, match=remedy):
            look()
    shutil.rmtree(tmp_path / "source")
    assert not list(tmp_path.iterdir())
