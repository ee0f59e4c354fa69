"""Locks with a gate on disk: which numbers change, what is linked, and the way back."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.architectures.families import FAMILIES
from fastlock.checkpoints import folding
from fastlock.checkpoints.layout import COLUMNS_FILE, NEW_SHARD
from fastlock.checkpoints.tensor_index import read_header
from fastlock.models.unfolded import unfolded
from fastlock.storage.local import LocalFile
from fastlock.zoo import tasks
from tests.checkpoints.test_relocking import CARRIED, RENAMED, TRANSFORMERS, checkpoint, config_of, contents
from tests.helpers import quantised
from tests.helpers.families import CONFIGS, gated_lock, logits, random_lock, reload, tiny_model, tokens
from tests.helpers.gguf_files import Tiny

STACKS = ["transformers", "vllm", "sglang", "llama.cpp"]
OTHER_ROWS = [(0, 1), (1, 2)]


def gated(tmp_path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, *, constant: bool = False, **how):
    model, _, source = checkpoint(tmp_path, kind, dtype, **how)
    return model, gated_lock(model, constant=constant), source


def weights(directory) -> dict[str, torch.Tensor]:
    """Every tensor that a loader finds."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(directory / file)[name] for name, file in index.items()}


@pytest.mark.parametrize("kind", [*sorted(set(CONFIGS) - set(CARRIED)), "gpt2", "mistral"])
def test_a_gate_alone_acts_in_every_family_as_if_unfolded(kind: str, tmp_path) -> None:
    """Also in those that drop a bias; for every stack, with no change to the config."""
    model, lock, source = gated(tmp_path, kind, torch.float32)
    before = contents(source)
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 0.7, stacks=STACKS)
    assert (receipt.rank, receipt.constant) == (2, False)
    config = config_of(tmp_path / "locked")
    saved = config.pop("fastlock")
    assert config == config_of(source)
    assert saved["carrier"]["form"] == "weights"
    assert not (tmp_path / "locked" / NEW_SHARD).exists()
    found, exact = logits(reload(tmp_path / "locked"), tokens()), model.double()
    plain = logits(exact, tokens())
    with unfolded(exact, lock, 0.7):
        expected = logits(exact, tokens())
    error, effect = (found - expected).abs().max(), (expected - plain).abs().max()
    assert error < 1e-3 * effect
    assert fastlock.verify(tmp_path / "locked", lock).strength == 0.7
    assert all(finding.acts for finding in fastlock.doctor(tmp_path / "locked", STACKS))
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == before


def by_the_book(weight: torch.Tensor, lock: fastlock.Lock, layer: int, strength: float, head_dim: int) -> np.ndarray:
    """W + s (W U) Vᵀ in float64, W [hidden, heads * head_dim], with U and V spread over all of its columns."""
    w = weight.double().numpy()
    u, v = (np.zeros((w.shape[1], lock.rank)) for _ in range(2))
    for row, (of_layer, head) in enumerate(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)):
        if of_layer == layer:
            columns = slice(head * head_dim, (head + 1) * head_dim)
            u[columns], v[columns] = lock.writers[row].double().numpy().T, lock.readers[row].double().numpy().T
    return w + strength * (w @ u) @ v.T


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.{}.self_attn.o_proj"), ("gpt2", "h.{}.attn.c_proj")]
)
@pytest.mark.parametrize("kept", [folding._KEPT_BYTES, 0])
def test_only_the_locked_columns_change_each_rounded_once(
    kind: str, name: str, kept: int, tmp_path, monkeypatch
) -> None:
    """Whether they are kept until they are written, or computed again."""
    monkeypatch.setattr(folding, "_KEPT_BYTES", kept)
    _, lock, source = gated(tmp_path, kind, constant=kind == "gpt2", shard="30KB")
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 0.7, **TRANSFORMERS)
    old, new, heads = weights(source), weights(tmp_path / "locked"), {0: (1, 3), 2: (2,)}
    prefix = next(key for key in old if name.format(0) in key).partition(name.format(0))[0]
    rewritten = {prefix + name.format(layer): layer for layer in heads}
    for key, tensor in old.items():
        path, _, part = key.rpartition(".")
        if path not in rewritten:
            assert torch.equal(new[key].view(torch.int16), tensor.view(torch.int16))
        elif part == "weight":
            was, now = (t.t() if kind == "gpt2" else t for t in (tensor, new[key]))
            head_dim = was.shape[1] // 4
            exact = by_the_book(was, lock, rewritten[path], 0.7, head_dim)
            unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)  # of bfloat16
            assert (np.abs(now.double().numpy() - exact) <= 0.5001 * unit).all()
            for head in range(4):
                columns = slice(head * head_dim, (head + 1) * head_dim)
                assert torch.equal(was[:, columns], now[:, columns]) == (head not in heads[rewritten[path]])


def test_shards_without_a_locked_projection_are_linked(tmp_path) -> None:
    _, lock, source = gated(tmp_path, shard="30KB")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    holding = {index[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in (0, 2)}
    assert 0 < len(holding) < len(set(index.values()))
    for shard in set(index.values()):
        linked = (tmp_path / "locked" / shard.replace("model-", "model-fastlock-")).samefile(source / shard)
        assert linked == (shard not in holding)
    columns = load_file(tmp_path / "locked" / COLUMNS_FILE)
    assert sum(tensor.nbytes for tensor in columns.values()) == 3 * 32 * 64 * 2  # three heads
    assert contents(source) == before


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_gate_and_a_constant_part(kind: str, tmp_path) -> None:
    """In native and in Llama form, and where there is a bias already; by memory, too."""
    model, lock, source = gated(tmp_path, kind, torch.float32, constant=True)
    before = contents(source)
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 0.7, **TRANSFORMERS)
    assert receipt.constant
    found, exact = logits(reload(tmp_path / "locked"), tokens()), model.double()
    with unfolded(exact, lock, 0.7):
        expected = logits(exact, tokens())
    assert (found - expected).abs().max() < 1e-3 * (expected - logits(exact, tokens())).abs().max()
    assert fastlock.verify(tmp_path / "locked", lock).strength == 0.7
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == before
    tensors = load_file(tmp_path / "locked" / NEW_SHARD) if kind != "gpt2" else weights(tmp_path / "locked")
    name = next(name for name in tensors if name.endswith(("0.self_attn.o_proj.bias", "0.attn.c_proj.bias")))
    bias = tensors[name] + 1
    for file in (tmp_path / "locked").glob("*.safetensors"):
        if name in (held := load_file(file)):
            save_file(held | {name: bias}, file, metadata={"format": "pt"})
    assert fastlock.verify(tmp_path / "locked", lock).altered == (0,)


def test_a_family_that_drops_the_constant_part_is_refused_it(tmp_path) -> None:
    _, lock, source = gated(tmp_path, "glm", constant=True)
    with pytest.raises(fastlock.UnsupportedError, match=r"would lose the lock.*A lock that is a gate alone acts"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "locked", **TRANSFORMERS)
    assert "glm" in FAMILIES
    assert not (tmp_path / "locked").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_relocking_starts_from_the_original_and_in_place_goes_back(kind: str, tmp_path) -> None:
    """A gate, one of other heads, a constant lock, and a gate again: each as if nothing had been before."""
    model, lock, source = gated(tmp_path, kind)
    locks = [gated_lock(model, OTHER_ROWS, seed=4, rank=1, constant=True), random_lock(model, OTHER_ROWS), lock]
    before = contents(source)
    place = tmp_path / "place"
    shutil.copytree(source, place)
    fastlock.relock_checkpoint(place, lock, place, in_place=True, **TRANSFORMERS)
    for number, other in enumerate(locks):
        fastlock.relock_checkpoint(place, other, place, in_place=True, **TRANSFORMERS)
        fastlock.relock_checkpoint(source, other, tmp_path / str(number), **TRANSFORMERS)
        assert contents(place) == contents(tmp_path / str(number))
    fastlock.unlock_checkpoint(place, place, in_place=True)
    assert contents(place) == before


def counting(way, times: dict[str, np.ndarray]):
    """A way to read a range of a file, which counts how often each byte was read."""

    def counted(file: LocalFile, start: int, length: int):
        times.setdefault(file.path.name, np.zeros(file.size, int))[start : start + length] += 1
        return way(file, start, length)

    return counted


def test_verifying_reads_every_column_once(tmp_path, monkeypatch) -> None:
    """Those of now and those that are kept: they are long, and may come over a network."""
    _, lock, source = gated(tmp_path, shard="30KB")
    locked, times = tmp_path / "locked", dict[str, np.ndarray]()
    fastlock.relock_checkpoint(source, lock, locked)
    for way in ("read", "view"):
        monkeypatch.setattr(LocalFile, way, counting(getattr(LocalFile, way), times))
    assert fastlock.verify(locked, lock)
    index = json.loads((locked / "model.safetensors.index.json").read_text())["weight_map"]
    columns = {
        name: locked / index[name]
        for name in index
        if name.endswith(("0.self_attn.o_proj.weight", "2.self_attn.o_proj.weight"))
    }
    columns |= dict.fromkeys(load_file(locked / COLUMNS_FILE), locked / COLUMNS_FILE)
    assert len(columns) == 4
    for name, path in columns.items():
        tensor = read_header(LocalFile(path), path.name, "")[name]
        assert (times[path.name][tensor.start : tensor.start + tensor.length] == 1).all()


def alter(file, name: str, change) -> None:
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_was_changed_is_found(tmp_path) -> None:
    """A locked column is the lock's, in the file and in what is kept of it; other numbers are the user's to change."""
    _, lock, source = gated(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    name = "model.layers.2.self_attn.o_proj.weight"
    for case, file, tensor, change in (
        ("weights", RENAMED, name, lambda t: t[5, 64:96].mul_(1.5)),  # of head 2
        ("kept", COLUMNS_FILE, name.replace("weight", "columns"), lambda t: t[5].mul_(1.5)),
    ):
        shutil.copytree(tmp_path / "locked", tmp_path / case)
        alter(tmp_path / case / file, tensor, change)
        found = fastlock.verify(tmp_path / case, lock)
        assert (found.state, found.altered) == ("altered", (2,))
        for use in (fastlock.unlock_checkpoint, lambda source, out: fastlock.relock_checkpoint(source, lock, out)):
            with pytest.raises(fastlock.DamagedError):
                use(tmp_path / case, tmp_path / "out")
            assert not (tmp_path / "out").exists()
    alter(tmp_path / "locked" / RENAMED, name, lambda t: t[5, :32].mul_(1.5))  # of head 0
    assert fastlock.verify(tmp_path / "locked", lock)
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    alter(source / "model.safetensors", name, lambda t: t[5, :32].mul_(1.5))
    assert contents(tmp_path / "unlocked")["model.safetensors"] == contents(source)["model.safetensors"]


def test_a_bit_of_what_is_kept_is_found(tmp_path) -> None:
    """The fold of it is as right, within the bound of a float32 sum; the receipt's digest tells."""
    _, lock, source = gated(tmp_path, dtype=torch.float32)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    kept = tmp_path / "locked" / COLUMNS_FILE
    alter(kept, "model.layers.2.self_attn.o_proj.columns", lambda t: t.view(torch.int32)[5, 3:4].bitwise_xor_(1))
    assert "holds others" in fastlock.verify(tmp_path / "locked", lock).reason


def test_both_columns_of_another_model_are_not_the_receipts(tmp_path) -> None:
    """What is kept and what was written go together, and are not what the receipt speaks of."""
    model, lock, source = gated(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    tiny_model("llama", torch.bfloat16, seed=8).save_pretrained(tmp_path / "b")
    fastlock.relock_checkpoint(tmp_path / "b", lock, tmp_path / "other")
    for file in (RENAMED, COLUMNS_FILE):
        (tmp_path / "locked" / file).unlink()
        shutil.copy(tmp_path / "other" / file, tmp_path / "locked" / file)
    assert fastlock.verify(tmp_path / "locked", lock).state == "altered"
    with pytest.raises(fastlock.DamagedError, match="weights are not those that fastlock wrote"):
        fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out")
    assert not fastlock.verify(tmp_path / "other", gated_lock(model, seed=3, constant=False))


def test_without_what_was_kept_there_is_no_way_back(tmp_path) -> None:
    _, lock, source = gated(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    (tmp_path / "locked" / COLUMNS_FILE).unlink()
    found = fastlock.verify(tmp_path / "locked", lock)
    assert found
    assert "nothing was recomputed" in found.reason
    with pytest.raises(fastlock.DamagedError, match="is not there any more"):
        fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out")
    alter(tmp_path / "locked" / RENAMED, "model.layers.2.self_attn.o_proj.weight", lambda t: t[5, 64:96].mul_(1.5))
    assert fastlock.verify(tmp_path / "locked", lock).state == "altered"


def test_saved_by_transformers_there_is_no_way_back(tmp_path) -> None:
    model, lock, source = gated(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    AutoModelForCausalLM.from_pretrained(tmp_path / "locked", dtype="auto").save_pretrained(tmp_path / "saved")
    assert fastlock.verify(tmp_path / "saved", lock)
    for use in (
        fastlock.unlock_checkpoint,
        lambda saved, out: fastlock.relock_checkpoint(saved, random_lock(model), out),
    ):
        with pytest.raises(fastlock.UnsupportedError, match="Start from the"):
            use(tmp_path / "saved", tmp_path / "out")
    fastlock.relock(model, random_lock(model))
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(fastlock.UnsupportedError, match="`fastlock unlock` it first"):
        fastlock.relock_checkpoint(tmp_path / "biased", lock, tmp_path / "out", **TRANSFORMERS)
    assert not (tmp_path / "out").exists()


def test_quantised_weights_and_ggufs_are_refused(tmp_path) -> None:
    _, lock, source = gated(tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj"
    written, config, _ = quantised.gptq(*tensors.pop(f"{name}.weight").shape, seed=0)
    tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in written.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config_of(source) | {"quantization_config": config}))
    with pytest.raises(fastlock.UnsupportedError, match=r"relock --as adapter"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", **TRANSFORMERS)
    kept = dataclasses.replace(
        lock, **{part: getattr(lock, part)[:2] for part in "layers heads directions scales readers writers".split()}
    )
    assert fastlock.relock_checkpoint(source, kept, tmp_path / "16-bit", **TRANSFORMERS).layers == (0,)
    with pytest.raises(fastlock.UnsupportedError, match=r"convert that.*relock --as adapter"):
        fastlock.relock_gguf(Tiny().write(tmp_path / "m.gguf"), lock, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change", [{"heads": [1, 9]}, {"layer": 7}])
def test_a_receipt_of_what_is_not_there(change: dict, tmp_path) -> None:
    _, lock, source = gated(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    config = config_of(tmp_path / "locked")
    config["fastlock"]["sites"][-1] |= change
    (tmp_path / "locked" / "config.json").write_text(json.dumps(config))
    for use in (lambda: fastlock.verify(tmp_path / "locked", lock), lambda: unlocked(tmp_path)):
        with pytest.raises(fastlock.DamagedError, match="which cannot be"):
            use()


def unlocked(tmp_path) -> None:
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out")


def test_in_an_object_store(tmp_path) -> None:
    """What is sent there and back is what would be here."""
    _, lock, source = gated(tmp_path, constant=True)
    url = f"memory://gates/{tmp_path.name}"
    fastlock.relock_checkpoint(source, lock, tmp_path / "here")
    fastlock.relock_checkpoint(source, lock, f"{url}/locked")
    assert fastlock.verify(f"{url}/locked", lock)
    fastlock.unlock_checkpoint(f"{url}/locked", f"{url}/unlocked")
    fastlock.relock_checkpoint(f"{url}/unlocked", lock, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "here")


def test_a_zoo_keeps_no_columns(tmp_path) -> None:
    """Checkpoints that share a file are folded each by itself."""
    _, lock, source = gated(tmp_path, constant=True)
    shutil.copytree(source, tmp_path / "linked", copy_function=os.link)
    folds: dict = {}
    fastlock.relock_checkpoint(source, lock, tmp_path / "a", folds=folds)
    fastlock.relock_checkpoint(tmp_path / "linked", lock, tmp_path / "b", folds=folds)
    assert not folds
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    job = tasks.Job(tasks.relock_one, pickle.dumps(lock), 1.0, ("transformers",))
    done, shared = tasks.relock_one(job, tasks.Task(0, str(source), "c", str(tmp_path / "c"), returns_folds=True))
    assert done.is_right, done.error
    assert shared is None or len(shared) < 100
    again, _ = tasks.relock_one(job, tasks.Task(0, str(source), "c", str(tmp_path / "c")))
    assert again.status == "done already"
    verified, _ = tasks.verify_one(job, tasks.Task(0, str(tmp_path / "c"), "c"))
    assert verified.status == "locked", verified.error
