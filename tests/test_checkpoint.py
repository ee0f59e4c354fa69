"""Checkpoints on disk, relocked and unlocked into new directories."""

import json

import pytest
import torch
from families import logits, random_lock, reload, same_state, tiny_model, tokens
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

import fastlock


def checkpoint(tmp_path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16):
    """A checkpoint with further files, and a lock that fits."""
    model = tiny_model(kind, dtype)
    directory = tmp_path / "source"
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    return model, random_lock(model), directory


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "gpt_oss", "seed_oss"])
def test_relock_then_unlock_gives_the_tensors_and_the_config_back(kind: str, tmp_path) -> None:
    model, lock, source = checkpoint(tmp_path, kind)
    before, ids = contents(source), tokens()
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 2.0)
    assert contents(source) == before
    assert receipt.strength == 2.0
    assert fastlock.verify(tmp_path / "locked", lock).strength == 2.0
    assert (tmp_path / "locked" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "locked" / "original" / "params.json").exists()
    fastlock.relock(model, lock, 2.0)
    assert torch.equal(logits(reload(tmp_path / "locked"), ids), logits(model, ids))
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    a, b = load_file(source / "model.safetensors"), load_file(tmp_path / "unlocked" / "model.safetensors")
    assert same_state(a, b)
    configs = [json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "unlocked")]
    assert configs[0] == configs[1]
    assert contents(tmp_path / "unlocked").keys() == before.keys()


def test_relocking_a_relocked_checkpoint_replaces_its_lock(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, "gpt2")
    for strength, a, b in [(2.0, "source", "one"), (3.0, "one", "two")]:
        fastlock.relock_checkpoint(tmp_path / a, lock, tmp_path / b, strength)
    assert fastlock.verify(tmp_path / "two", lock).strength == 3.0
    fastlock.unlock_checkpoint(tmp_path / "two", tmp_path / "unlocked")
    assert same_state(load_file(source / "model.safetensors"), load_file(tmp_path / "unlocked" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_refusal_leaves_nothing_behind(kind: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, kind)
    if kind == "llama":
        lock = random_lock(tiny_model("gpt2"))
    with pytest.raises(fastlock.FastlockError):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_error_while_writing_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    _, lock, source = checkpoint(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(fastlock.FastlockError, match="No space left"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    """The safetensors library has an error of its own for it."""
    _, lock, source = checkpoint(tmp_path)

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(fastlock.FastlockError, match="No space left"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_new_directory_has_parents_permissions_and_its_generation_config(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, "mistral")
    source.chmod(0o750)
    (source / "original" / "config.json").write_text("{}")
    generation = json.loads((source / "generation_config.json").read_text()) | {"max_new_tokens": 17}
    (source / "generation_config.json").write_text(json.dumps(generation))
    fastlock.relock_checkpoint(source, lock, tmp_path / "a" / "b")
    fastlock.unlock_checkpoint(tmp_path / "a" / "b", tmp_path / "a" / "c")
    for out in (tmp_path / "a" / "b", tmp_path / "a" / "c"):
        assert out.stat().st_mode & 0o777 == 0o750
        assert reload(out).generation_config.max_new_tokens == 17
        assert (out / "original" / "config.json").exists()


def test_an_existing_target_is_not_touched(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for out in (tmp_path / "out", source):
        with pytest.raises(fastlock.FastlockError, match="exists already"):
            fastlock.relock_checkpoint(source, lock, out)
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_unlocking_what_is_not_locked(tmp_path) -> None:
    _, _, source = checkpoint(tmp_path)
    with pytest.raises(fastlock.FastlockError, match="not relocked"):
        fastlock.unlock_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("original", [None, [], {}, {"model_type": "bert"}, {"model_type": "qwen2", "vocab_size": -3}])
def test_a_receipt_that_lies_about_the_original(original: object, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, "mistral")
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    path = tmp_path / "locked" / "config.json"
    config = json.loads(path.read_text())
    config["fastlock"]["carrier"]["original_config"] = original
    path.write_text(json.dumps(config))
    with pytest.raises(fastlock.FastlockError):
        fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update({"v_head.weight": torch.randn(3)}), "no place for v_head.weight"),
        (lambda t: t.update({"model.norm.weight": torch.randn(3)}), "model.norm.weight|can't be loaded"),
        (lambda t: t.update({"lm_head.weight": torch.randn(128, 64)}), "lm_head.weight is torch.float32"),
    ],
)
def test_a_checkpoint_that_loading_would_change_is_refused(change, message: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    rewrite(source, change)
    with pytest.raises(fastlock.FastlockError, match=message):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tensors_keep_the_dtype_that_they_have_on_disk(tmp_path) -> None:
    """Whatever config.json says it is."""
    _, lock, source = checkpoint(tmp_path, dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "back")
    assert same_state(load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))


def test_a_classifier_is_not_made_a_language_model(tmp_path) -> None:
    config = tiny_model("llama").config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "source")
    with pytest.raises(fastlock.FastlockError, match="LlamaForSequenceClassification"):
        fastlock.relock_checkpoint(tmp_path / "source", random_lock(tiny_model("llama")), tmp_path / "out")


def test_weights_without_the_lock_are_not_carried_along(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.00.pth"):
        (source / name).write_text("weights")
    (source / "dangling").symlink_to(tmp_path / "nowhere")
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    carried = {"config.json", "generation_config.json", "model.safetensors", "original", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == carried


def test_a_target_inside_the_source_or_of_an_impossible_name(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    before = contents(source)
    for out in (source / "out", tmp_path / ("x" * 300), tmp_path / "a\0b", None):
        with pytest.raises(fastlock.FastlockError):
            fastlock.relock_checkpoint(source, lock, out)
    assert contents(source) == before


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_the_llama_form_twice_still_knows_the_way_back(kind: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, kind)
    fastlock.relock_checkpoint(source, lock, tmp_path / "one", 1.0)
    fastlock.relock_checkpoint(tmp_path / "one", lock, tmp_path / "two", 2.0)
    fastlock.unlock_checkpoint(tmp_path / "two", tmp_path / "back")
    assert same_state(load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    configs = [json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "back")]
    assert configs[0] == configs[1]
