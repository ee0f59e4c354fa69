"""A band's bytes against the base's: whatever the layout of the files, and whatever a stranger put into them."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError
from fastlock.verification import BandVerification
from tests.helpers.families import CONFIGS, gated_lock, random_lock, tiny_gemma3, tiny_model

BAND = fastlock.Band(1, 1)


def verified(tmp_path: Path, band: fastlock.Band = BAND) -> BandVerification:
    return fastlock.verify(tmp_path / "tuned", base=tmp_path / "base", band=band)


@pytest.fixture
def pair(tmp_path) -> Path:
    """A base, and a fine-tune of which every tensor outside layer 1 differs."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers.1." not in name:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path


def rewritten(directory: Path, change) -> None:
    """Write a directory's tensors again, as `change` made them."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_a_frozen_band_is_unchanged_and_the_others_are_not(pair) -> None:
    found = verified(pair)
    assert found
    assert (found.state, found.layers, found.tensors, found.differences) == ("unchanged", (1,), 9, ())
    assert json.dumps(found.to_dict())
    for band in (fastlock.Band(0, 1), fastlock.Band(2, 2)):
        other = verified(pair, band)
        assert not other
        assert {difference.name.split(".")[2] for difference in other.differences} == {
            str(layer) for layer in band.layers
        } - {"1"}


def test_one_bit_is_found_and_named(pair) -> None:
    def flip(tensors):
        tensors["model.layers.1.input_layernorm.weight"].view(torch.int32)[5] ^= 1
        return tensors

    rewritten(pair / "tuned", flip)
    found = verified(pair)
    assert not found
    assert [(one.name, one.what) for one in found.differences] == [
        ("model.layers.1.input_layernorm.weight", "has other bytes")
    ]
    assert "1 tensors of layers 1 to 1 are not the base's" in found.reason


@pytest.mark.parametrize(
    ("change", "name", "what"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "mlp.up_proj.weight", "is missing"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(96)}),
            "mlp.up_proj.bias",
            "is not in the base",
        ),
        (
            lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(64, dtype=torch.bfloat16)}),
            "input_layernorm.weight",
            r"is BF16 \[64\], in the base F32 \[64\]",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"].reshape(64, 96)}
            ),
            "mlp.up_proj.weight",
            r"is F32 \[64, 96\], in the base F32 \[96, 64\]",
        ),
    ],
    ids=["missing", "added", "another dtype", "another shape"],
)
def test_each_kind_of_difference(change, name, what, pair) -> None:
    def changed(tensors):
        change(tensors)
        return tensors

    rewritten(pair / "tuned", changed)
    (difference,) = verified(pair).differences
    assert difference.name == f"model.layers.1.{name}"
    assert re.fullmatch(what, difference.what)


def test_shards_order_and_names_of_files_do_not_matter(pair) -> None:
    before = verified(pair).digest
    tensors = load_file(pair / "tuned" / "model.safetensors")
    (pair / "tuned" / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for number in range(3):
        file = f"part-{number}.safetensors"
        part = dict.fromkeys(reversed(names[number::3]))
        _written_in_order(pair / "tuned" / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (pair / "tuned" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = verified(pair)
    assert found
    assert found.digest == before


def _written_in_order(path: Path, tensors: dict) -> None:
    """safetensors by hand: the library sorts what it writes."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def test_another_prefix_and_tied_names_do_not_matter(pair) -> None:
    """As the inner model saves itself; and an output embedding that only one of the two stores."""

    def inner(tensors):
        tensors.pop("lm_head.weight")
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    rewritten(pair / "tuned", inner)
    assert verified(pair)

    def twice(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    rewritten(pair / "base", twice)
    assert verified(pair)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_family(kind, tmp_path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "base")
    frozen = fastlock.freeze(model, BAND)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in frozen.trained:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    found = verified(tmp_path)
    assert found, found.differences
    assert found.tensors >= len(frozen.trained)  # experts are stored one by one
    assert not verified(tmp_path, fastlock.Band(2, 2))


def test_the_decoder_of_a_model_that_sees(tmp_path) -> None:
    model = tiny_gemma3()
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
    found = verified(tmp_path)
    assert found
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "tuned")
    (difference,) = verified(tmp_path).differences
    assert difference.name.endswith("layers.1.mlp.up_proj.weight")


def test_a_relocked_directory_says_why(pair) -> None:
    model = tiny_model("llama")
    fastlock.relock_checkpoint(pair / "tuned", random_lock(model, [(1, 0)]), pair / "relocked")
    found = fastlock.verify(pair / "relocked", base=pair / "base", band=BAND)
    assert not found
    assert {one.what for one in found.differences} == {"is not in the base"}
    assert "fastlock unlock" in found.reason
    fastlock.unlock_checkpoint(pair / "relocked", pair / "unlocked")
    assert fastlock.verify(pair / "unlocked", base=pair / "base", band=BAND)


def relocked(pair: Path, locked_layers: tuple[int, ...] = (0, 1)) -> tuple[Path, fastlock.Lock]:
    """The fine-tune, relocked in some layers."""
    lock = random_lock(tiny_model("llama"), [(layer, 0) for layer in locked_layers])
    fastlock.relock_checkpoint(pair / "tuned", lock, pair / "relocked")
    return pair / "relocked", lock


def test_a_relocked_directory_with_its_lock_is_checked_for_both(pair) -> None:
    directory, lock = relocked(pair)
    found = fastlock.verify(directory, lock, base=pair / "base", band=BAND)
    plain = fastlock.verify(pair / "tuned", base=pair / "base", band=BAND)
    assert found
    assert (found.state, found.digest, found.tensors) == ("unchanged", plain.digest, plain.tensors)
    assert found.lock == fastlock.verify(directory, lock)
    assert "are the base's; the biases that were added at strength" in found.reason
    assert "those of layers 1 lie in the band" in found.reason
    assert json.dumps(found.to_dict())
    assert not fastlock.verify(directory, lock, base=pair / "base", band=fastlock.Band(0, 1))


def test_a_lock_outside_the_band_is_told(pair) -> None:
    directory, lock = relocked(pair, (0, 2))
    found = fastlock.verify(directory, lock, base=pair / "base", band=BAND)
    assert found
    assert "(none lies in the band)" in found.reason


def test_either_change_of_a_relocked_directory_is_found(pair) -> None:
    """The bias of a locked layer of the band; a band that was trained before it was relocked; another lock; none."""
    directory, lock = relocked(pair)
    other = random_lock(tiny_model("llama"), [(0, 1), (1, 1)])
    found = fastlock.verify(directory, other, base=pair / "base", band=BAND)
    assert not found
    assert "the lock is not in place" in found.reason
    shutil.rmtree(directory)

    def trained(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
        return tensors

    rewritten(pair / "tuned", trained)
    directory, lock = relocked(pair)
    found = fastlock.verify(directory, lock, base=pair / "base", band=BAND)
    assert not found
    assert found.lock
    assert [(one.name, one.what) for one in found.differences] == [
        ("model.layers.1.mlp.up_proj.weight", "has other bytes")
    ]
    assert "1 tensors of layers 1 to 1 are not the base's; the biases" in found.reason

    plain = fastlock.verify(pair / "base", lock, base=pair / "base", band=BAND)
    assert not plain
    assert (plain.state, plain.differences) == ("changed", ())
    assert "are the base's; the lock is not in place" in plain.reason


def test_a_bias_that_is_not_the_locks_is_found(pair) -> None:
    directory, lock = relocked(pair)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.1.self_attn.o_proj.bias" in tensors:
            tensors["model.layers.1.self_attn.o_proj.bias"][5] += 0.5
            path.unlink()
            save_file(tensors, path, {"format": "pt"})
    found = fastlock.verify(directory, lock, base=pair / "base", band=BAND)
    assert not found
    assert found.lock.state == "altered"
    assert "the lock is not in place" in found.reason


def test_a_relocked_model_that_transformers_saved_is_to_be_unlocked_first(pair) -> None:
    model = tiny_model("llama")
    lock = random_lock(model, [(1, 0)])
    fastlock.relock(model, lock)
    model.save_pretrained(pair / "saved")
    found = fastlock.verify(pair / "saved", lock, base=pair / "base", band=BAND)
    assert not found
    assert found.lock
    assert "verify what fastlock unlock makes of it" in found.reason
    fastlock.unlock_checkpoint(pair / "saved", pair / "unlocked")
    assert fastlock.verify(pair / "unlocked", base=pair / "base", band=BAND)


def test_no_tensor_is_loaded(pair, monkeypatch) -> None:
    """Headers, and the bytes of the band alone."""
    read: list[tuple[str, int]] = []
    from fastlock.storage.local import LocalFile

    original = LocalFile.read

    def counted(self, start, length):
        read.append((self.path.name, length))
        return original(self, start, length)

    monkeypatch.setattr(LocalFile, "read", counted)
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr(torch, "load", None)
    assert verified(pair)
    band = sum(tensor.numel() * 4 for name, tensor in tiny_model("llama").state_dict().items() if ".layers.1." in name)
    headers = 2 * 4000
    assert 2 * band <= sum(length for name, length in read if name == "model.safetensors") <= 2 * band + 2 * headers


@pytest.mark.parametrize(
    ("band", "error", "said"),
    [
        (fastlock.Band(1, 3), MismatchError, "lies outside .*tuned, which has 3 layers"),
        (fastlock.Band(1, 2, 32), MismatchError, "layers 32"),
        (fastlock.Band(1, 1, 3, "gemma"), MismatchError, "model_type gemma"),
        ((1, 1), FastlockError, "the band is tuple"),
    ],
)
def test_bands_of_other_models(band, error, said, pair) -> None:
    with pytest.raises(error, match=said):
        verified(pair, band)


def test_what_goes_together(pair) -> None:
    lock = random_lock(tiny_model("llama"))
    for arguments, said in (
        ({"base": pair / "base"}, "Give both"),
        ({"band": BAND}, "Give both"),
        ({"lock": lock, "band": BAND}, "Give both"),
    ):
        with pytest.raises(FastlockError, match=said):
            fastlock.verify(pair / "tuned", **arguments)
    with pytest.raises(FastlockError, match="Save the model"):
        fastlock.verify(tiny_model("llama"), base=pair / "base", band=BAND)
    with pytest.raises(FastlockError):
        fastlock.verify(pair / "tuned")


def test_what_a_loader_would_put_on_top_is_refused(pair) -> None:
    (pair / "tuned" / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="adapter_config.json.*Merge it first"):
        verified(pair)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("layers.{}.self_attn.o_proj.weight", UnsupportedError, "have as many: 3, 3"),
        ("module.model.layers.{}.x", UnsupportedError, "as DataParallel or DDP names it"),
        ("model.layers.0{}.mlp.up_proj.weight", DamagedError, "names a layer in two ways"),
    ],
)
def test_names_that_could_mean_two_things_are_refused(name, error, said, pair) -> None:
    def doubled(tensors):
        return {**tensors, **{name.format(layer): torch.zeros(2) for layer in range(3)}}

    rewritten(pair / "tuned", doubled)
    with pytest.raises(error, match=said):
        verified(pair)


def test_a_decoy_beside_an_altered_list_is_refused(pair) -> None:
    """The base's layers under a second name, and the list that is loaded altered, and short of a tensor or a layer."""
    base = load_file(pair / "base" / "model.safetensors")
    decoy = {f"decoy.layers.{name.split('layers.')[1]}": tensor for name, tensor in base.items() if "layers." in name}
    whole = load_file(pair / "tuned" / "model.safetensors")
    for lacking in ("model.layers.0.self_attn.o_proj.weight", "model.layers.2."):
        altered = {name: tensor + 1 for name, tensor in whole.items() if not name.startswith(lacking)}
        save_file({**altered, **decoy}, pair / "tuned" / "model.safetensors")
        with pytest.raises(UnsupportedError, match="have as many: 3, [23]|have as many: [23], 3"):
            verified(pair)


def test_missing_layers_are_refused(pair) -> None:
    rewritten(pair / "tuned", lambda t: {name: tensor for name, tensor in t.items() if ".layers.2." not in name})
    with pytest.raises(UnsupportedError, match="says 3 layers .*have as many: 2"):
        verified(pair)


def test_damaged_files_are_refused(pair) -> None:
    path = pair / "tuned" / "model.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:100], struct.pack("<Q", 2**60) + whole[8:], b""):
        path.write_bytes(data)
        with pytest.raises(DamagedError):
            verified(pair)
    path.write_bytes(whole)
    (pair / "base" / "config.json").write_text("[]")
    with pytest.raises(DamagedError):
        verified(pair)
    shutil.rmtree(pair / "base")
    with pytest.raises(FastlockError, match="no such directory"):
        verified(pair)


def test_a_file_that_changes_meanwhile_is_refused(pair, monkeypatch) -> None:
    from fastlock.checkpoints.band_digests import StoredBand

    original = StoredBand._digest

    def late(self, tensor):
        digest = original(self, tensor)
        with (pair / "tuned" / "model.safetensors").open("ab") as file:
            file.write(b"x")
        return digest

    monkeypatch.setattr(StoredBand, "_digest", late)
    with pytest.raises(DamagedError, match="was changed while it was being read"):
        verified(pair)


def test_large_tensors_are_digested_in_blocks(pair, monkeypatch) -> None:
    whole = verified(pair).digest
    monkeypatch.setattr("fastlock.checkpoints.band_digests._BLOCK_BYTES", 1000)
    assert verified(pair).digest == whole


def gated(pair: Path, constant: bool) -> tuple[Path, fastlock.Lock]:
    """The fine-tune, relocked with a gate in layers 0 and 1."""
    lock = gated_lock(tiny_model("llama"), [(0, 0), (1, 2)], constant=constant)
    fastlock.relock_checkpoint(pair / "tuned", lock, pair / "gated")
    return pair / "gated", lock


@pytest.mark.parametrize("constant", [False, True])
def test_of_a_gate_the_bands_weights_as_they_were_are_the_bases(constant: bool, pair) -> None:
    directory, lock = gated(pair, constant)
    found = fastlock.verify(directory, lock, base=pair / "base", band=BAND)
    plain = fastlock.verify(pair / "tuned", base=pair / "base", band=BAND)
    assert (found.state, found.digest, found.tensors) == ("unchanged", plain.digest, plain.tensors)
    assert "the weights that were rewritten at strength 1 are the lock's (those of layers 1" in found.reason
    alone = fastlock.verify(directory, base=pair / "base", band=BAND)
    other_bytes = [one.name for one in alone.differences if one.what == "has other bytes"]
    assert other_bytes == ["model.layers.1.self_attn.o_proj.weight"]
    assert (len(alone.differences) > 1) == constant  # biases
    assert f"whose {'biases and weights' if constant else 'weights'} are its own: give the lock too" in alone.reason


@pytest.mark.parametrize("column", [64, 0], ids=["of the locked head", "of another"])
def test_a_weight_of_the_band_beside_a_gate_that_was_changed_is_found(column: int, pair) -> None:
    """Before it was relocked, so that the lock is in place all the same."""

    def trained(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight"][3, column] += 1
        return tensors

    rewritten(pair / "tuned", trained)
    directory, lock = gated(pair, constant=False)
    found = fastlock.verify(directory, lock, base=pair / "base", band=BAND)
    assert not found
    assert found.lock
    assert [one.name for one in found.differences] == ["model.layers.1.self_attn.o_proj.weight"]


def test_a_gate_that_transformers_saved_is_told_from_a_lock_that_can_be_taken_out(pair) -> None:
    directory, lock = gated(pair, constant=False)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(pair / "saved")
    found = fastlock.verify(pair / "saved", lock, base=pair / "base", band=BAND)
    assert not found
    assert found.lock
    assert "a gate is not taken out of that; verify the directory that fastlock relock wrote" in found.reason
    assert "what fastlock unlock makes" not in found.reason
    directory, constant = relocked(pair)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(pair / "saved too")
    found = fastlock.verify(pair / "saved too", constant, base=pair / "base", band=fastlock.Band(0, 1))
    assert "verify what fastlock unlock makes of it" in found.reason


def test_a_frozen_band_that_a_gate_is_put_into_in_memory_counts_as_changed(pair) -> None:
    """Freezing stops training; a gate rewrites weights all the same, and that is told."""
    model = AutoModelForCausalLM.from_pretrained(pair / "tuned")
    fastlock.freeze(model, BAND)
    lock = gated_lock(model, [(0, 0), (1, 2)], constant=False)
    fastlock.relock(model, lock)
    model.save_pretrained(pair / "saved")
    for given in (None, lock):
        found = fastlock.verify(pair / "saved", given, base=pair / "base", band=BAND)
        assert [one.name for one in found.differences] == ["model.layers.1.self_attn.o_proj.weight"]
    fastlock.unlock(model)
    model.save_pretrained(pair / "unlocked")
    assert fastlock.verify(pair / "unlocked", base=pair / "base", band=BAND)
