"""Checkpoints on disk, relocked and unlocked into new directories."""

import json

import pytest
import torch
from families import logits, random_lock, reload, same_state, tiny_model, tokens
from safetensors.torch import load_file

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
