"""Checkpoints that transformers saved from a relocked model, over the relocked checkpoint that it came from."""

import shutil
from pathlib import Path

import pytest
import torch

import fastlock
from tests.helpers.families import gated_lock, logits, random_lock, reload, tiny_model, tokens
from tests.helpers.relocked_adapters import contents


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_not_relocked_is_not_loaded_to_find_that_out(in_place: bool, monkeypatch, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    before = contents(tmp_path)
    monkeypatch.setattr("fastlock.checkpoints.resaved.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(fastlock.FastlockError, match=r"/plain: is not relocked: .* There is nothing to unlock\."):
        fastlock.unlock_checkpoint(tmp_path / "plain", tmp_path / ("plain" if in_place else "out"), in_place=in_place)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shards", ["50KB", "1GB"])
@pytest.mark.parametrize("make_lock", [random_lock, gated_lock])
def test_a_single_file_over_a_relocked_checkpoint(make_lock, shards: str, tmp_path: Path) -> None:
    """transformers removes the shards that we linked, and leaves our index: the error says what works, and it does."""
    model, out = tiny_model("llama", torch.bfloat16), tmp_path / "out"
    lock = make_lock(model)
    model.save_pretrained(tmp_path / "source", max_shard_size=shards)
    fastlock.relock_checkpoint(tmp_path / "source", lock, out)
    loaded = reload(out)
    with torch.no_grad():
        loaded.model.embed_tokens.weight += 1  # as training might
    expected = logits(loaded, tokens())
    loaded.save_pretrained(out)
    said = (
        r"index of shards that are not there \('model-fastlock-00001-of-0000\d\.safetensors'\): .* transformers takes "
        r"model\.safetensors; .* remove model\.safetensors\.index\.json, .*: model-fastlock\.safetensors and the "
        r"directory fastlock\."
    )
    for work in (
        lambda: fastlock.verify(out, lock),
        lambda: fastlock.unlock_checkpoint(out, tmp_path / "new"),
        lambda: fastlock.relock_checkpoint(out, lock, tmp_path / "new"),
    ):
        with pytest.raises(fastlock.DamagedError, match=said):
            work()
    assert not (tmp_path / "new").exists()
    assert torch.equal(logits(reload(out), tokens()), expected)
    (out / "model.safetensors.index.json").unlink()
    (out / "model-fastlock.safetensors").unlink()
    shutil.rmtree(out / "fastlock")
    assert fastlock.verify(out, lock)
    assert torch.equal(logits(reload(out), tokens()), expected)
