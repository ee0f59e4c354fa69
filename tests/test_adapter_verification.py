"""`verify` of adapters: over their base, as PEFT left them, and after whatever may have happened since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import fastlock
from tests.helpers.adapters import base_model, config_of, loaded, rewrite_config, rewrite_tensors, save_adapter
from tests.helpers.families import random_lock, tiny_model

HERE = {"stacks": ["transformers"]}


@pytest.fixture(scope="module")
def lock() -> fastlock.Lock:
    return random_lock(tiny_model("llama"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, lock: fastlock.Lock) -> Path:
    """A base, an adapter that touches its projections and one that does not, relocked."""
    directory = tmp_path_factory.mktemp("zoo")
    base = base_model(directory / "base")
    base_model(directory / "other", seed=9)
    for name, kind, asked in (("own", "lora", HERE), ("shared", "elsewhere", {})):
        source = save_adapter(config_of(kind), directory / name)
        fastlock.relock_adapter(source, base, lock, directory / f"{name}-locked", 2.0, **asked)
    return directory


def verified(directory: Path, lock: fastlock.Lock, state: str, *words: str, base: Path | None = None) -> None:
    """What was found is this state, and its reason says these words."""
    found = fastlock.verify(directory, lock, base=base)
    assert found.state == state, found
    assert bool(found) == (state == "locked")
    for word in words:
        assert word in found.reason, found.reason


@pytest.mark.parametrize("name", ["own", "shared"])
def test_finds_the_strength_over_the_base_that_the_receipt_names(zoo: Path, name: str, lock: fastlock.Lock) -> None:
    found = fastlock.verify(zoo / f"{name}-locked", lock)
    assert (found.state, found.strength, found.layers, found.altered) == ("locked", 2.0, (0, 2), ())
    assert fastlock.verify(zoo / name, lock, base=zoo / "base").state == "not locked"
    other = random_lock(tiny_model("llama"), seed=7)
    verified(zoo / f"{name}-locked", other, "not locked", "another lock")


@pytest.mark.parametrize("name", ["own", "shared"])
def test_another_base_is_named(zoo: Path, name: str, lock: fastlock.Lock) -> None:
    verified(zoo / f"{name}-locked", lock, "not locked" if name == "shared" else "altered", base=zoo / "other")
    if name == "own":
        verified(zoo / "own-locked", lock, "altered", "its base is not the one", base=zoo / "other")


def test_a_base_that_is_unlocked_again_or_locked_twice(zoo: Path, lock: fastlock.Lock) -> None:
    verified(zoo / "shared-locked", lock, "not locked", "in its base", "there it is not", base=zoo / "base")
    verified(zoo / "own-locked", lock, "altered", "the lock acts twice", base=zoo / "base-locked")


def test_over_a_relocked_base_an_adapter_needs_no_receipt(zoo: Path, lock: fastlock.Lock) -> None:
    verified(zoo / "shared", lock, "locked", "its base holds the fold of all 2 layers", base=zoo / "base-locked")
    verified(zoo / "own", lock, "altered", "touches the locked projections", "is off by", base=zoo / "base-locked")


def test_biases_that_the_adapter_had_before_are_no_part_of_the_lock(
    zoo: Path, lock: fastlock.Lock, tmp_path: Path
) -> None:
    source = save_adapter(config_of("lora bias"), tmp_path / "own")
    fastlock.relock_adapter(source, zoo / "base", lock, tmp_path / "locked", 2.0, **HERE)
    verified(tmp_path / "locked", lock, "locked")
    verified(source, lock, "not locked", base=zoo / "base")


def test_a_base_relocked_at_another_strength(zoo: Path, lock: fastlock.Lock, tmp_path: Path) -> None:
    fastlock.relock_checkpoint(zoo / "base", lock, tmp_path / "weaker", 1.0)
    verified(zoo / "shared-locked", lock, "altered", "strength 1, and it was at 2", base=tmp_path / "weaker")


def test_says_when_peft_saved_it_anew(zoo: Path, lock: fastlock.Lock, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(zoo / "own-locked", kept)
    model: Any = loaded(zoo / "base", zoo / "own-locked").float()
    model.save_pretrained(kept)
    model.save_pretrained(tmp_path / "lost")
    verified(kept, lock, "locked", "was saved anew since, as PEFT does, so unlock cannot", base=zoo / "base")
    verified(tmp_path / "lost", lock, "locked", "there is no receipt, but every bias is the fold", base=zoo / "base")
    with pytest.raises(fastlock.DamagedError, match="was changed since it was relocked"):
        fastlock.unlock_checkpoint(kept, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_says_when_it_was_trained_on(zoo: Path, lock: fastlock.Lock, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(zoo / "own-locked", trained)
    key = "base_model.model.model.layers.2.self_attn.o_proj.lora_A.weight"
    rewrite_tensors(trained, lambda tensors: tensors | {key: 1.01 * tensors[key]})
    found = fastlock.verify(trained, lock, base=zoo / "base")
    assert (found.state, found.altered) == ("altered", (2,))
    assert "was trained on" in found.reason


@pytest.mark.parametrize("carrier", ["adapter bias", "sidecar"])
def test_a_bias_off_by_more_than_its_rounding_is_found(zoo: Path, lock, carrier: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fastlock.relock_adapter(zoo / "own", zoo / "base", lock, out, 2.0, carrier=carrier, **HERE)
    path = out / ("fastlock.safetensors" if carrier == "sidecar" else "adapter_model.safetensors")
    tensors = safetensors.torch.load_file(path)
    key = next(key for key in tensors if "layers.0.self_attn.o_proj" in key and key.endswith("bias"))
    largest = int(tensors[key].abs().argmax())
    for off, state in ((1e-7, "locked"), (1e-5, "altered")):
        changed = tensors | {key: tensors[key].clone()}
        changed[key][largest] *= 1 + off
        safetensors.torch.save_file(changed, path)
        assert fastlock.verify(out, lock).state == state
    (out / "fastlock.safetensors").unlink(missing_ok=True)
    if carrier == "sidecar":
        assert fastlock.verify(out, lock).altered == (0, 2)


def test_weights_that_would_be_loaded_instead_are_found(zoo: Path, lock: fastlock.Lock, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    shutil.copytree(zoo / "own-locked", beside)
    (beside / "adapter_model.bin").write_bytes(b"pickle")
    verified(beside, lock, "altered", "adapter_model.bin", "without the lock", base=zoo / "base")


def test_a_fold_that_is_off_by_more_than_was_allowed(zoo: Path, lock: fastlock.Lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora", lora_alpha=0.001), tmp_path / "adapter")
    out = tmp_path / "out"
    fastlock.relock_adapter(source, zoo / "base", lock, out, gap=0.02, relocked_base=tmp_path / "locked")
    verified(out, lock, "locked", "off by at most", "as was allowed")
    receipt = json.loads((out / "fastlock.json").read_text())
    (out / "fastlock.json").write_text(json.dumps(receipt | {"allowed_gap": 1e-9}))
    verified(out, lock, "altered", "is off by")


def test_without_a_base_it_asks_for_one(zoo: Path, lock: fastlock.Lock, tmp_path: Path) -> None:
    source = rewrite_config(save_adapter(config_of("lora"), tmp_path / "adapter"), base_model_name_or_path="who/knows")
    with pytest.raises(fastlock.FastlockError, match="Give that"):
        fastlock.verify(source, lock)
    with pytest.raises(fastlock.FastlockError, match="is verified without a base"):
        fastlock.verify(zoo / "base", lock, base=zoo / "base")
    with pytest.raises(fastlock.FastlockError, match="a base is given with an adapter's directory"):
        fastlock.verify(tiny_model("llama"), lock, base=zoo / "base")
