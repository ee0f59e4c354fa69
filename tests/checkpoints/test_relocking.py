"""Checkpoints on disk, relocked and unlocked into new directories: what is read, what is written, what is linked."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForSequenceClassification

import fastlock
from fastlock.architectures.families import ATTENTION, FAMILIES
from fastlock.checkpoints.layout import ASIDE, NEW_SHARD
from fastlock.models.sites import sites
from fastlock.storage import local
from fastlock.storage import new_directory as folders
from tests.helpers.families import (
    CONFIGS,
    logits,
    random_lock,
    randomized,
    reload,
    same_state,
    state,
    tiny_config,
    tiny_gemma3,
    tiny_llava,
    tiny_model,
    tokens,
)

LLAMA_FORM = {"mistral", "qwen2"}
CARRIED = sorted(kind for kind, family in FAMILIES.items() if family.bias_flag is not None or kind in LLAMA_FORM)
RENAMED = "model-fastlock-00001-of-00001.safetensors"
TRANSFORMERS = {"stacks": ["transformers"]}


def checkpoint(tmp_path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str | None = None, **changes):
    """A checkpoint with further files, and a lock that fits."""
    model = tiny_model(kind, dtype, **changes)
    directory = tmp_path / "source"
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    return model, random_lock(model), directory


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def config_of(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("kind", CARRIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_is_relocked_as_in_memory_and_unlocked_byte_for_byte(kind: str, dtype, tmp_path) -> None:
    model, lock, source = checkpoint(tmp_path, kind, dtype)
    before, ids = contents(source), tokens()
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 2.0, **TRANSFORMERS)
    assert contents(source) == before
    in_memory = fastlock.relock(model, lock, 2.0)
    assert (receipt.lock_digest, receipt.strength, receipt.layers) == (lock.digest, 2.0, in_memory.layers)
    assert (receipt.weights_digest, receipt.biases_digest) == (in_memory.weights_digest, in_memory.biases_digest)
    loaded = reload(tmp_path / "locked")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert fastlock.verify(tmp_path / "locked", lock).strength == 2.0
    assert fastlock.verify(loaded, lock)
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == before


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - set(CARRIED)))
def test_families_that_would_lose_the_lock_are_refused(kind: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, kind)
    with pytest.raises(fastlock.UnsupportedError, match="without an error"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", **TRANSFORMERS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", sorted(kind for kind, family in FAMILIES.items() if family.bias_flag))
def test_the_table_of_switched_biases_is_transformers_own(kind: str) -> None:
    """What the flag gives a bias to, and nothing else, gets one on disk."""
    family, names = FAMILIES[kind], {}
    for on in (False, True):
        with torch.device("meta"):
            names[on] = set(AutoModelForCausalLM.from_config(tiny_config(kind, **{family.bias_flag: on})).state_dict())
    modules = {name.removesuffix(".bias") for name in names[True] - names[False]}
    assert {path.partition("layers.")[2].partition(".")[2] or path for path in modules if "h." not in path} <= set(
        family.switched
    )
    assert {name for name in family.switched if any(path.endswith(name) for path in modules)} == set(family.switched)


@pytest.mark.parametrize("kind", ["falcon", "starcoder2", "llama", "gpt_neox"])
def test_the_flag_the_other_way(kind: str, tmp_path) -> None:
    flag = FAMILIES[kind].bias_flag
    model, lock, source = checkpoint(tmp_path, kind, **{flag: not getattr(tiny_config(kind), flag)})
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked", **TRANSFORMERS)
    fastlock.relock(model, lock)
    loaded = reload(tmp_path / "locked")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == before
    fastlock.unlock(loaded)
    fastlock.unlock(model)
    assert same_state(loaded.state_dict(), model.state_dict())


def test_every_bias_that_the_flag_asks_for_is_in_the_files(tmp_path) -> None:
    """transformers makes missing ones zero; vLLM leaves them as the memory was."""
    _, lock, source = checkpoint(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    added = load_file(tmp_path / "out" / NEW_SHARD)
    assert set(added) == {f"model.layers.{layer}.{name}.bias" for layer in range(3) for name in ATTENTION}
    for name, bias in added.items():
        assert bias.dtype == torch.bfloat16
        assert bool(bias.count_nonzero()) == (
            name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.2.self_attn.o_proj.bias")
        )


def test_shards_get_names_that_nobody_saves_to(tmp_path) -> None:
    """transformers reads `model.safetensors` alone wherever there is one, and old savers write through hard links."""
    _, lock, source = checkpoint(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {RENAMED, NEW_SHARD}
    shutil.rmtree(source)
    _, lock, source = checkpoint(tmp_path, shard="30KB")
    names = {path.name for path in source.glob("*.safetensors")}
    assert len(names) > 2
    fastlock.relock_checkpoint(source, lock, tmp_path / "sharded")
    assert {p.name for p in (tmp_path / "sharded").glob("*.safetensors")} == {
        NEW_SHARD,
        *(name.replace("model-", "model-fastlock-") for name in names),
    }
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in (tmp_path / "sharded").glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in (tmp_path / "sharded").glob("*.safetensors") for tensor in load_file(path).values()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_sharded_checkpoint(kind: str, tmp_path) -> None:
    model, lock, source = checkpoint(tmp_path, kind, shard="30KB")
    before = contents(source)
    assert len(before) > 6
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked", **TRANSFORMERS)
    fastlock.relock(model, lock)
    assert torch.equal(logits(reload(tmp_path / "locked"), tokens()), logits(model, tokens()))
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == before


def test_a_single_shard_that_has_the_name_already(tmp_path) -> None:
    """With an index of its own, of a family whose biases are replaced in the shard."""
    _, lock, source = checkpoint(tmp_path, "gpt2")
    name = "model-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(source / name), name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    assert fastlock.verify(tmp_path / "locked", lock)
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize(
    ("kind", "message"), [("gpt_neo", "vllm would lose the lock"), ("qwen3", "which transformers does not write")]
)
def test_a_checkpoint_saved_from_memory_is_refused_for_a_stack_that_drops_it(kind: str, message: str, tmp_path) -> None:
    model, lock, _ = checkpoint(tmp_path, kind)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(fastlock.UnsupportedError, match=message):
        fastlock.relock_checkpoint(tmp_path / "saved", lock, tmp_path / "out")
    fastlock.relock_checkpoint(tmp_path / "saved", lock, tmp_path / "out", **TRANSFORMERS)


def test_only_headers_configs_and_locked_projections_are_read(tmp_path, monkeypatch) -> None:
    _, lock, source = checkpoint(tmp_path, shard="30KB")
    viewed, read = [], 0
    view, whole = local.LocalFile.view, local.LocalFile.read

    def spy_view(self, start, length):
        viewed.append((self.path.name, start, length))
        return view(self, start, length)

    def spy_read(self, start, length):
        nonlocal read
        read += length
        return whole(self, start, length)

    monkeypatch.setattr(local.LocalFile, "view", spy_view)
    monkeypatch.setattr(local.LocalFile, "read", spy_read)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert sum(length for _, _, length in viewed) == 2 * 64 * 128 * 2  # two layers of [64, 4 * 32] bfloat16
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors"))
    assert read == headers + 2 * sum(  # to parse them, and for their digests
        path.stat().st_size for path in (source / "config.json", source / "model.safetensors.index.json")
    )


def test_weights_are_linked_and_copied_when_asked_and_all_else_is_copied(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "linked")
    fastlock.relock_checkpoint(source, lock, tmp_path / "copied", copy=True)
    assert (tmp_path / "linked" / RENAMED).samefile(source / "model.safetensors")
    assert not (tmp_path / "copied" / RENAMED).samefile(source / "model.safetensors")
    for name in ("tokenizer.json", "original/params.json"):
        assert not (tmp_path / "linked" / name).samefile(source / name)
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")


def test_links_across_file_systems(tmp_path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    model, lock, source = checkpoint(tmp_path)
    out = other / f"fastlock-test-{os.getpid()}"
    try:
        fastlock.relock_checkpoint(source, lock, out)
        assert (out / RENAMED).readlink() == source / "model.safetensors"
        fastlock.relock(model, lock)
        assert torch.equal(logits(reload(out), tokens()), logits(model, tokens()))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_shared_blocks_where_the_file_system_has_them(tmp_path, monkeypatch) -> None:
    _, lock, source = checkpoint(tmp_path)

    def clone(new, request, old):
        assert request == 0x40049409
        with open(old, "rb", closefd=False) as file:
            file.seek(0)
            os.write(new, file.read())

    monkeypatch.setattr(folders.fcntl, "ioctl", clone)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert (tmp_path / "out" / RENAMED).read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / RENAMED).samefile(source / "model.safetensors")
    assert fastlock.verify(tmp_path / "out", lock)


def test_a_hugging_face_cache_is_never_written_through(tmp_path) -> None:
    """There `snapshots/<commit>/name` is a symbolic link to `blobs/<hash>`."""
    _, lock, plain = checkpoint(tmp_path)
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    source.mkdir(parents=True)
    for number, path in enumerate(plain.glob("*.json*")):
        path.rename(blobs / str(number))
        (source / path.name).symlink_to(f"../../blobs/{number}")
    (plain / "model.safetensors").rename(blobs / "weights")
    (source / "model.safetensors").symlink_to("../../blobs/weights")
    before = contents(tmp_path)
    for kind in ({}, {"copy": True}):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", **kind)
        assert fastlock.verify(tmp_path / "out", lock)
        assert (tmp_path / "out" / RENAMED).samefile(blobs / "weights") == (not kind)
        fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(source)
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "back")
        assert contents(tmp_path) == before
    fastlock.relock_checkpoint(source, lock, source, in_place=True)
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("blobs")} == {
        name: data for name, data in before.items() if name.startswith("blobs")
    }
    assert fastlock.verify(source, lock)


def test_a_model_with_a_vision_tower(tmp_path) -> None:
    """Its decoder's weights have other names on disk than in memory, and its config is a part of the config."""
    model = tiny_gemma3()
    model.save_pretrained(tmp_path / "source")
    lock, before = random_lock(model), contents(tmp_path / "source")
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert all(site.bias is not None for site in sites(loaded))
    fastlock.relock(model, lock)
    for mine, theirs in zip(sites(model), sites(loaded), strict=True):
        if mine.bias is not None:
            assert torch.equal(mine.bias, theirs.bias)
    assert fastlock.verify(tmp_path / "out", lock)
    assert fastlock.verify(loaded, lock)
    fastlock.unlock(loaded)
    assert all(site.bias is None for site in sites(loaded))
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("model", [tiny_gemma3, tiny_llava])
def test_a_vision_tower_saved_from_memory(model, tmp_path) -> None:
    model = model()
    before, lock = state(model), random_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path / "saved")
    fastlock.relock_checkpoint(tmp_path / "saved", lock, tmp_path / "again", 2.0)
    assert fastlock.verify(tmp_path / "again", lock).strength == 2.0
    fastlock.unlock_checkpoint(tmp_path / "again", tmp_path / "back")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert same_state(state(loaded), before)


def test_a_classifier_stays_one(tmp_path) -> None:
    config = tiny_config("llama", num_labels=3)
    model = randomized(LlamaForSequenceClassification(config), 0)
    model.save_pretrained(tmp_path / "source")
    lock = random_lock(model)
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    fastlock.relock(model, lock)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)
    assert config_of(tmp_path / "out")["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_relocking_a_relocked_checkpoint_replaces_its_lock(kind: str, tmp_path) -> None:
    model, lock, source = checkpoint(tmp_path, kind)
    other = random_lock(model, rows=[(1, 0), (2, 1)], seed=7)
    fastlock.relock_checkpoint(source, lock, tmp_path / "one", 2.0, **TRANSFORMERS)
    fastlock.relock_checkpoint(tmp_path / "one", other, tmp_path / "two", 3.0, **TRANSFORMERS)
    fastlock.relock_checkpoint(source, other, tmp_path / "direct", 3.0, **TRANSFORMERS)
    assert contents(tmp_path / "two") == contents(tmp_path / "direct")
    assert fastlock.verify(tmp_path / "two", other).strength == 3.0
    assert not fastlock.verify(tmp_path / "two", lock)
    fastlock.unlock_checkpoint(tmp_path / "two", tmp_path / "unlocked")
    assert contents(tmp_path / "unlocked") == contents(source)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "granite"])
def test_in_place_and_back(kind: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, kind)
    (source / "pytorch_model.bin").write_text("weights")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "elsewhere", **TRANSFORMERS)
    fastlock.relock_checkpoint(source, lock, source, in_place=True, **TRANSFORMERS)
    assert contents(source) == contents(tmp_path / "elsewhere")
    assert fastlock.verify(source, lock)
    fastlock.relock_checkpoint(source, lock, source, 3.0, in_place=True, **TRANSFORMERS)
    assert fastlock.verify(source, lock).strength == 3.0
    fastlock.unlock_checkpoint(source, source, in_place=True)
    assert contents(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "elsewhere"}


def test_in_place_means_the_checkpoint_itself(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    with pytest.raises(fastlock.FastlockError, match="in place means"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", in_place=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_model_card_gets_a_section_and_loses_it_again(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    card = b"---\nlicense: mit\n---\n# My model\n\xff no UTF-8"
    (source / "README.md").write_bytes(card)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", 2.5)
    written = (tmp_path / "out" / "README.md").read_bytes()
    assert written.startswith(card)
    for text in ("## Safety lock", lock.digest, "Strength: 2.5", "transformers, vllm"):
        assert text.encode() in written
    (tmp_path / "out" / "README.md").write_bytes(written + b"a later remark\n")
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_bytes() == card + b"a later remark\n"


@pytest.mark.parametrize("how", ["saved", "disk"])
def test_memory_and_disk_take_each_others_checkpoints_over(how: str, tmp_path) -> None:
    model, lock, source = checkpoint(tmp_path, "llama")
    if how == "saved":
        fastlock.relock(model, lock, 1.0)
        model.save_pretrained(tmp_path / "locked")
    else:
        fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 1.0)
    fastlock.relock_checkpoint(tmp_path / "locked", lock, tmp_path / "again", 2.0)
    assert fastlock.verify(tmp_path / "again", lock).strength == 2.0
    loaded = reload(tmp_path / "again")
    fastlock.relock(loaded, lock, 3.0)
    loaded.save_pretrained(tmp_path / "third")
    assert fastlock.verify(tmp_path / "third", lock).strength == 3.0
    fastlock.unlock_checkpoint(tmp_path / "third", tmp_path / "back")
    assert same_state(load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    assert "fastlock" not in config_of(tmp_path / "back")


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_a_refusal_leaves_nothing_behind(kind: str, tmp_path) -> None:
    """Of another geometry; in a stack that would lose it."""
    _, lock, source = checkpoint(tmp_path, kind)
    error, message = fastlock.UnsupportedError, "vllm would lose the lock"
    if kind == "llama":
        lock = random_lock(tiny_model("gpt2"))
        error, message = fastlock.MismatchError, "head_dim"
    with pytest.raises(error, match=message):
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
        with pytest.raises(fastlock.FastlockError, match="already exists"):
            fastlock.relock_checkpoint(source, lock, out)
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_unlocking_what_is_not_locked(tmp_path) -> None:
    _, _, source = checkpoint(tmp_path)
    with pytest.raises(fastlock.FastlockError, match="not relocked"):
        fastlock.unlock_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_bias(locked) -> None:
    tensors = load_file(locked / NEW_SHARD)
    tensors["model.layers.0.self_attn.o_proj.bias"] *= 1.5
    save_file(tensors, locked / NEW_SHARD, metadata={"format": "pt"})


def change_zeros(locked) -> None:
    """A constant that is added to head outputs can undo the displacement."""
    tensors = load_file(locked / NEW_SHARD)
    assert not tensors["model.layers.1.self_attn.v_proj.bias"].any()
    tensors["model.layers.1.self_attn.v_proj.bias"] += 1
    save_file(tensors, locked / NEW_SHARD, metadata={"format": "pt"})


def change_config(locked) -> None:
    (locked / "config.json").write_text(json.dumps(config_of(locked) | {"rope_theta": 5.0}))


def change_index(locked) -> None:
    save_file({"extra.weight": torch.ones(3)}, locked / "extra.safetensors")
    index = json.loads((locked / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = "extra.safetensors"
    (locked / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("change", [change_bias, change_zeros, change_config, change_index])
def test_what_was_changed_since_is_not_thrown_away(change, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    change(tmp_path / "locked")
    before = contents(tmp_path / "locked")
    assert fastlock.verify(tmp_path / "locked", lock).state == "altered"
    with pytest.raises(fastlock.DamagedError, match="changed since"):
        fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "locked", in_place=True)
    with pytest.raises(fastlock.DamagedError, match="changed since"):
        fastlock.relock_checkpoint(tmp_path / "locked", lock, tmp_path / "out")
    assert contents(tmp_path / "locked") == before


@pytest.mark.parametrize("original", [None, [], {}, {"model_type": "bert"}, {"model_type": "qwen2", "vocab_size": -3}])
def test_a_receipt_that_lies_about_the_original(original: object, tmp_path) -> None:
    model, lock, _ = checkpoint(tmp_path, "mistral")
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path / "locked")
    config = config_of(tmp_path / "locked")
    config["fastlock"]["carrier"]["original_config"] = original
    (tmp_path / "locked" / "config.json").write_text(json.dumps(config))
    with pytest.raises(fastlock.DamagedError):
        fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_fastlock_has_no_use_for_come_along(tmp_path) -> None:
    """Loading through transformers would drop a value head and complain of mixed dtypes; links keep everything."""
    _, lock, source = checkpoint(tmp_path)
    rewrite(source, lambda t: t.update({"v_head.weight": torch.randn(3), "lm_head.weight": torch.randn(128, 64)}))
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert load_file(tmp_path / "out" / RENAMED)["v_head.weight"].shape == (3,)
    assert fastlock.verify(tmp_path / "out", lock)


def test_a_mistral_with_a_tensor_that_a_llama_lacks(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, "mistral")
    rewrite(source, lambda t: t.update({"v_head.weight": torch.randn(3)}))
    with pytest.raises(fastlock.UnsupportedError, match="'v_head.weight' has no place in the Llama form"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


def test_the_biases_have_the_dtype_that_the_weights_have_on_disk(tmp_path) -> None:
    """Whatever config.json says it is."""
    _, lock, source = checkpoint(tmp_path, dtype=torch.float32)
    (source / "config.json").write_text(json.dumps(config_of(source) | {"dtype": "bfloat16"}))
    assert fastlock.relock_checkpoint(source, lock, tmp_path / "locked").dtype == "float32"
    assert {bias.dtype for bias in load_file(tmp_path / "locked" / NEW_SHARD).values()} == {torch.float32}


def test_weights_without_the_lock_are_set_aside_and_come_back(tmp_path) -> None:
    """Some stacks would prefer them; but nothing is lost."""
    _, lock, source = checkpoint(tmp_path)
    others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.00.pth"]
    others += ["consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin.index.fp16.json"]
    others += ["model.fp16.safetensors", "model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"]
    for name in others:
        (source / name).write_text("weights")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert not any((tmp_path / "out" / name).exists() for name in others)
    assert all((tmp_path / "out" / ASIDE / name).read_text() == "weights" for name in others)
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_shards_that_count_are_not_set_aside(tmp_path) -> None:
    """Whatever they are called."""
    model, lock, source = checkpoint(tmp_path)
    shard = "consolidated-00001.safetensors"
    (source / "model.safetensors").rename(source / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(source / shard), shard)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    fastlock.relock(model, lock)
    assert torch.equal(logits(reload(tmp_path / "out"), tokens()), logits(model, tokens()))
    assert fastlock.verify(tmp_path / "out", lock)
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("kind", "module"), [("llama", "o"), ("llama", "q"), ("mistral", "q"), ("qwen2", "o")])
def test_biases_that_the_config_switches_off(kind: str, module: str, layer: int, tmp_path) -> None:
    """Relocking would switch them on: in a locked layer, or in another."""
    _, lock, source = checkpoint(tmp_path, kind)
    name = f"model.layers.{layer}.self_attn.{module}_proj"
    rewrite(source, lambda t: t.update({f"{name}.bias": torch.ones(len(t[f"{name}.weight"]), dtype=torch.bfloat16)}))
    with pytest.raises(fastlock.DamagedError, match="holds biases that its config switches off"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_relocked_checkpoint_under_the_config_of_its_base(tmp_path) -> None:
    """Relocked once more, it would have twice the fold."""
    _, lock, source = checkpoint(tmp_path)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    shutil.rmtree(tmp_path / "locked" / "fastlock")
    shutil.copy(source / "config.json", tmp_path / "locked" / "config.json")
    with pytest.raises(fastlock.FastlockError, match="start from the original checkpoint"):
        fastlock.relock_checkpoint(tmp_path / "locked", lock, tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["fastlock/notes.txt", "fastlock", RENAMED, NEW_SHARD])
def test_files_of_the_users_own_under_fastlocks_names(name: str, kind: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, kind)
    (source / name).parent.mkdir(exist_ok=True)
    save_file({"x": torch.ones(2)}, source / name)
    before = contents(source)
    with pytest.raises(fastlock.FastlockError, match="fastlock needs that name"):
        fastlock.relock_checkpoint(source, lock, source, in_place=True)
    assert contents(tmp_path) == {f"source/{file}": data for file, data in before.items()}


def test_a_note_that_was_put_beside_what_is_set_aside_is_kept(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    fastlock.relock_checkpoint(source, lock, source, in_place=True)
    (source / "fastlock" / "notes.txt").write_text("mine")
    fastlock.unlock_checkpoint(source, source, in_place=True)
    assert (source / "fastlock" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.sig"])
def test_what_unlocking_gives_does_not_follow_the_source(name: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, shard="30KB")
    (source / "model.sig").write_text("signed")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked")
    with (source / name).open("a") as file:
        file.write("\n")
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    with (tmp_path / "back" / name).open("a") as file:
        file.write("\n")
    fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "again")
    assert contents(tmp_path / "again") == before
    with (tmp_path / "locked" / ASIDE / name).open("a") as file:
        file.write("\n")
    with pytest.raises(fastlock.DamagedError, match="is not what was set aside"):
        fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out")
    if name != "config.json":  # without that, it is taken for one that transformers saved
        (tmp_path / "locked" / ASIDE / name).unlink()
        with pytest.raises(fastlock.DamagedError, match="is not what was set aside"):
            fastlock.relock_checkpoint(tmp_path / "locked", lock, tmp_path / "out")


def test_projections_of_mixed_dtypes_with_biases(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, "gpt2", torch.float32)
    names = [f"transformer.h.2.attn.c_proj.{part}" for part in ("weight", "bias")]
    rewrite(source, lambda t: t.update({name: t[name].bfloat16() for name in names}))
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, source, in_place=True)
    assert fastlock.verify(source, lock)
    fastlock.unlock_checkpoint(source, source, in_place=True)
    assert contents(source) == before


def test_a_config_with_a_lone_surrogate(tmp_path) -> None:
    """JSON can say it, UTF-8 can't."""
    _, lock, source = checkpoint(tmp_path)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"note": "\\ud83d é",', 1))
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes().decode())["note"] == "\ud83d é"
    assert fastlock.verify(tmp_path / "out", lock)
    assert fastlock.verify(reload(tmp_path / "out"), lock)


def test_what_lies_beside_a_saved_checkpoint_stays(tmp_path) -> None:
    """Everything but its own shards, which are written anew; signatures come back."""
    model, lock, _ = checkpoint(tmp_path)
    fastlock.relock(model, lock)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="30KB")
    mine = {"adapters/a.safetensors": {"x": torch.ones(2)}, "medusa.safetensors": {"y": torch.ones(2)}}
    (saved / "adapters").mkdir()
    for name, tensors in mine.items():
        save_file(tensors, saved / name)
    (saved / "medusa.safetensors.index.json").write_text("{}")
    (saved / "x.sig").write_text("signature")
    kept = {name: data for name, data in contents(saved).items() if not name.startswith(("model-", "model.", "config"))}
    assert len(kept) == 5
    for strength in (2.0, 3.0):
        fastlock.relock_checkpoint(saved, lock, saved, strength, in_place=True)
        assert fastlock.verify(saved, lock).strength == strength
        assert not (saved / "x.sig").exists()
        assert (saved / ASIDE / "x.sig").read_text() == "signature"
        assert {"model.safetensors", *mine} == {name for name in contents(saved) if name.endswith(".safetensors")}
    fastlock.unlock_checkpoint(saved, saved, in_place=True)
    assert {name: data for name, data in contents(saved).items() if name in kept} == kept
    assert not (saved / "fastlock").exists()


def test_a_card_that_has_a_section_already(tmp_path) -> None:
    """It came from another checkpoint's card, say."""
    _, lock, source = checkpoint(tmp_path)
    (source / "README.md").write_text("mine\n")
    fastlock.relock_checkpoint(source, lock, tmp_path / "other", 2.0)
    shutil.copy(tmp_path / "other" / "README.md", source / "README.md")
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, source, 5.0, in_place=True)
    assert b"Strength: 5" in (source / "README.md").read_bytes()
    fastlock.unlock_checkpoint(source, source, in_place=True)
    assert contents(source) == before


def test_the_card_of_a_saved_checkpoint_says_what_is_so_now(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    (source / "README.md").write_text("mine\n")
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked", 2.0)
    reload(tmp_path / "locked").save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "locked" / "README.md", tmp_path / "saved" / "README.md")
    fastlock.relock_checkpoint(tmp_path / "saved", lock, tmp_path / "again", 3.0)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Strength: 3" in card
    assert "Strength: 2" not in card
    fastlock.unlock_checkpoint(tmp_path / "again", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_text() == "mine\n"


def test_a_broken_link_is_no_file(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    (source / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(fastlock.DamagedError, match="dangling: cannot be followed"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "save_pretrained"), ("model.gguf", "GGUF"), ("adapter_config.json", "ADAPTER --base BASE")],
)
def test_other_formats_are_refused_with_the_way_out(name: str, message: str, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    (source / "model.safetensors").rename(source / name)
    with pytest.raises(fastlock.UnsupportedError, match=message):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


def test_a_target_inside_the_source_or_of_an_impossible_name(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    before = contents(source)
    for out in (source / "out", tmp_path / ("x" * 300), tmp_path / "a\0b", None):
        with pytest.raises(fastlock.FastlockError):
            fastlock.relock_checkpoint(source, lock, out)
    assert contents(source) == before


def test_folds_of_shared_files_are_made_once(tmp_path, monkeypatch) -> None:
    _, lock, source = checkpoint(tmp_path)
    shutil.copytree(source, tmp_path / "linked", copy_function=os.link)
    folds = {}
    fastlock.relock_checkpoint(source, lock, tmp_path / "a", folds=folds)
    assert len(folds) == 2
    monkeypatch.setattr("fastlock.checkpoints.folding.fold", lambda *given: pytest.fail("folded again"))
    fastlock.relock_checkpoint(tmp_path / "linked", lock, tmp_path / "b", folds=folds)
    assert len(folds) == 2
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(pytest.fail.Exception):
        fastlock.relock_checkpoint(source, lock, tmp_path / "c", 3.0, folds=folds)


def test_both_a_single_file_and_an_index_of_others(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path, shard="30KB")
    save_file({"x": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(fastlock.DamagedError, match="which one counts depends"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


def test_a_single_file_with_an_index_of_its_own(tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    names = load_file(source / "model.safetensors")
    index = {"metadata": {"note": "mine"}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["note"] == "mine"
    assert set(written["weight_map"].values()) == {RENAMED, NEW_SHARD}
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("stacks", [[], "vllm", ["vllm", "tgi"]])
def test_unknown_stacks(stacks: object, tmp_path) -> None:
    _, lock, source = checkpoint(tmp_path)
    with pytest.raises(fastlock.FastlockError, match="give a list of serving stacks"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out", stacks=stacks)
