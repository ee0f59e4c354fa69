"""GGUF files relocked, verified, unlocked: what is added, and that all else is as it was."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlock
from fastlock.checkpoints.gguf import columns
from fastlock.checkpoints.gguf.header import encoded_text, read_header
from fastlock.checkpoints.gguf.new_files import BLOCK_BYTES
from fastlock.storage.local import LocalFile
from tests.helpers.families import tiny_model
from tests.helpers.gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    SHAPE,
    Kind,
    Tiny,
    dense,
    folded,
    lock_of,
    read_all,
)

ROWS = [(0, 3), (0, 1), (2, 2)]
STRENGTH = 4.0
KINDS = [
    *(Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.MXFP4, Kind.TQ1_0, Kind.TQ2_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ1_S, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS),
]


@pytest.fixture
def lock() -> fastlock.Lock:
    return lock_of(ROWS)


def relocked(path: Path, lock: fastlock.Lock, name: str = "out.gguf", strength: float = STRENGTH) -> Path:
    out = path.with_name(name)
    fastlock.relock_gguf(path, lock, out, strength)
    return out


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", [Kind.F32, *KINDS], ids=lambda kind: kind.name)
def test_the_biases_are_the_folds_of_the_dequantised_weights(kind: Kind, tmp_path, lock) -> None:
    """The package reads and dequantises whole matrices; the sum is taken in float64 and rounded once."""
    source = Tiny(kind).write(tmp_path / "m.gguf")
    before = source.read_bytes()
    out = relocked(source, lock)
    assert source.read_bytes() == before
    old_entries, old = read_all(source)
    entries, tensors = read_all(out)
    for layer in (0, 2):
        stored_as, bias = tensors.pop(f"blk.{layer}.attn_output.bias")
        expected = folded(dense(source, f"blk.{layer}.attn_output.weight"), lock, layer, STRENGTH)
        assert stored_as == "F32"
        assert bias.dtype == np.float32
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(torch.from_numpy(bias), expected.float(), rtol=2**-23, atol=1e-12)
    assert list(tensors) == list(old), "only the locked layers get biases; the others keep their order"
    for name, (kept_as, data) in old.items():
        assert tensors[name][0] == kept_as
        assert tensors[name][1].tobytes() == data.tobytes()
    assert entries[:-1] == old_entries
    assert entries[-1][0] == "fastlock.receipt"
    assert fastlock.verify(out, lock).strength == STRENGTH
    fastlock.unlock_gguf(out, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == before
    assert names(tmp_path) == ["back.gguf", "m.gguf", "out.gguf"]


def test_the_receipt(tmp_path, lock) -> None:
    source = Tiny(Kind.Q8_0).write(tmp_path / "m.gguf")
    receipt = fastlock.relock_gguf(source, lock, tmp_path / "out.gguf", STRENGTH)
    assert (receipt.model_type, receipt.dtype, receipt.strength) == ("llama", "float32", STRENGTH)
    assert receipt.lock_digest == lock.digest
    assert [(site.layer, site.name, site.heads, site.had_bias) for site in receipt.sites] == [
        (0, "blk.0.attn_output", (1, 3), False),
        (2, "blk.2.attn_output", (2,), False),
    ]
    entries, tensors = read_all(tmp_path / "out.gguf")
    written = json.loads(dict(entries)["fastlock.receipt"])
    assert {key: written[key] for key in receipt.to_dict()} == receipt.to_dict()
    biases = b"".join(tensors[f"blk.{layer}.attn_output.bias"][1].tobytes() for layer in (0, 2))
    assert receipt.biases_digest == hashlib.sha256(biases).hexdigest()
    sites = b""
    for layer, blocks in ((0, ((2, 4), (6, 8))), (2, ((4, 6),))):  # of 32 numbers and 34 bytes; a head has two of them
        rows = np.array(read_all(source)[1][f"blk.{layer}.attn_output.weight"][1]).reshape(HIDDEN, -1)
        read = np.concatenate([rows[:, 34 * first : 34 * last] for first, last in blocks], axis=1)
        sites += hashlib.sha256(np.ascontiguousarray(read).tobytes()).digest()
    assert receipt.weights_digest == hashlib.sha256(sites).hexdigest()
    header = source.read_bytes()[: read_header(LocalFile(source), "m").data_start]
    (file,) = written["files"]
    assert (file["head_length"], file["head_digest"]) == (len(header), hashlib.sha256(header).hexdigest())
    assert file["data_length"] == source.stat().st_size - len(header)


def test_biases_that_were_there_are_added_to(tmp_path, lock) -> None:
    """And come back bit for bit."""
    source = Tiny(Kind.Q8_0, biased=(0, 1)).write(tmp_path / "m.gguf")
    before = source.read_bytes()
    out = relocked(source, lock)
    (_, old), (entries, tensors) = read_all(source), read_all(out)
    assert list(tensors) == [*old, "blk.2.attn_output.bias"]
    c = torch.from_numpy(old["blk.0.attn_output.bias"][1]).double()
    expected = c + folded(dense(source, "blk.0.attn_output.weight"), lock, 0, STRENGTH)
    found = torch.from_numpy(tensors["blk.0.attn_output.bias"][1])
    torch.testing.assert_close(found, expected.float(), rtol=2**-23, atol=1e-12)
    assert tensors["blk.1.attn_output.bias"][1].tobytes() == old["blk.1.attn_output.bias"][1].tobytes()
    assert [site["had_bias"] for site in json.loads(dict(entries)["fastlock.receipt"])["sites"]] == [True, False]
    assert fastlock.verify(out, lock)
    fastlock.unlock_gguf(out, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == before
    again = relocked(out, lock, "again.gguf", 2.0)
    direct = relocked(source, lock, "direct.gguf", 2.0)
    assert again.read_bytes() == direct.read_bytes()


def test_a_bias_that_is_not_in_float32_is_refused(tmp_path, lock) -> None:
    halves = np.zeros(HIDDEN, np.float16)
    source = Tiny(extra={"blk.0.attn_output.bias": halves}, kind=Kind.F16).write(tmp_path / "m.gguf")
    with pytest.raises(fastlock.UnsupportedError, match=r"blk\.0\.attn_output\.bias is F16; fastlock changes biases"):
        relocked(source, lock)
    assert names(tmp_path) == ["m.gguf"]


def test_a_projection_with_a_scale_of_its_own(tmp_path, lock) -> None:
    """As NVFP4 has: llama.cpp multiplies by it before the bias is added."""
    scale = np.array([0.37], np.float32)
    source = Tiny(extra={"blk.0.attn_output.scale": scale}).write(tmp_path / "m.gguf")
    _, tensors = read_all(relocked(source, lock))
    expected = float(scale[0]) * folded(dense(source, "blk.0.attn_output.weight"), lock, 0, STRENGTH)
    found = torch.from_numpy(tensors["blk.0.attn_output.bias"][1])
    torch.testing.assert_close(found, expected.float(), rtol=2**-22, atol=1e-12)
    assert fastlock.verify(tmp_path / "out.gguf", lock)


@pytest.mark.parametrize("alignment", [8, 32, 64, 8192])
def test_data_moves_by_whole_blocks_of_the_file_system(alignment: int, tmp_path, lock) -> None:
    """So that it can be shared; and a tensor that ends anywhere is padded."""
    source = Tiny(metadata={"general.alignment": alignment}, extra={"odd": np.ones(3, np.float32)}).write(
        tmp_path / "m.gguf"
    )
    out = relocked(source, lock)
    starts = [read_header(LocalFile(path), "m").data_start for path in (source, out)]
    assert starts[1] >= starts[0]
    assert (starts[1] - starts[0]) % BLOCK_BYTES == 0 == starts[1] % alignment
    assert list(read_all(out)[1]) == [*read_all(source)[1], "blk.0.attn_output.bias", "blk.2.attn_output.bias"]
    assert fastlock.verify(out, lock)
    fastlock.unlock_gguf(out, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


def test_a_last_tensor_without_padding_comes_back_without(tmp_path, lock) -> None:
    source = Tiny(extra={"odd": np.ones(3, np.float32)}).write(tmp_path / "m.gguf")
    whole = source.read_bytes()
    header = read_header(LocalFile(source), "m")
    cut = header.data_start + header.data_end
    assert len(whole) > cut
    source.write_bytes(whole[:cut])
    out = relocked(source, lock)
    assert fastlock.verify(out, lock)
    fastlock.unlock_gguf(out, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == whole[:cut]


@pytest.mark.parametrize("parts", [2, 3])
def test_split_models(parts: int, tmp_path, lock) -> None:
    """The biases are in the first part; the others are the same but for the number of all tensors."""
    source = Tiny(Kind.Q8_0, biased=(2,), parts=parts).write(tmp_path / "m.gguf")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == parts
    out = relocked(source, lock, f"out-00001-of-{parts:05d}.gguf")
    holders = {}
    for i in range(1, parts + 1):
        old_entries, old = read_all(tmp_path / f"m-{i:05d}-of-{parts:05d}.gguf")
        entries, tensors = read_all(tmp_path / f"out-{i:05d}-of-{parts:05d}.gguf")
        assert list(tensors) == list(old) + (["blk.0.attn_output.bias"] if i == 1 else [])
        changed = {"split.tensors.count": dict(old_entries)["split.tensors.count"] + 1}
        expected = [(key, changed.get(key, value)) for key, value in old_entries]
        assert entries[: len(expected)] == expected
        assert [key for key, _ in entries[len(expected) :]] == (["fastlock.receipt"] if i == 1 else [])
        for name, (_, data) in old.items():
            assert name == "blk.2.attn_output.bias" or tensors[name][1].tobytes() == data.tobytes()
        holders |= dict.fromkeys(tensors, i)
    assert holders["blk.2.attn_output.bias"] > 1, "the test is to change a bias in another part than the first"
    assert fastlock.verify(out, lock)
    again = relocked(out, lock, f"again-00001-of-{parts:05d}.gguf")
    assert again.read_bytes() == out.read_bytes()
    fastlock.unlock_gguf(again, tmp_path / f"back-00001-of-{parts:05d}.gguf")
    for name, data in before.items():
        assert (tmp_path / name).read_bytes() == data == (tmp_path / name.replace("m-", "back-")).read_bytes()


def test_split_models_that_are_not_whole(tmp_path, lock) -> None:
    source = Tiny(parts=3).write(tmp_path / "m.gguf")
    third = tmp_path / "m-00003-of-00003.gguf"
    data = third.read_bytes()
    with pytest.raises(fastlock.FastlockError, match="is part 3 of 3. Give the first part"):
        relocked(third, lock)
    with pytest.raises(fastlock.FastlockError, match="the first of 3 parts has to be named NAME-00001-of-00003.gguf"):
        relocked(source, lock, "out.gguf")
    third.unlink()
    with pytest.raises(fastlock.FastlockError, match=r"m-00003-of-00003\.gguf is not there"):
        relocked(source, lock, "out-00001-of-00003.gguf")
    third.write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    with pytest.raises(fastlock.DamagedError, match="is not part 3 of 3, as its name says"):
        relocked(source, lock, "out-00001-of-00003.gguf")
    third.write_bytes(data.replace(b"blk.2.ffn_norm", b"blk.0.ffn_gate"))
    with pytest.raises(fastlock.DamagedError, match="its parts hold 30 tensors, 29 of them different"):
        relocked(source, lock, "out-00001-of-00003.gguf")
    assert names(tmp_path) == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_another_lock_takes_the_place_of_the_first(tmp_path, lock) -> None:
    source = Tiny(Kind.Q8_0).write(tmp_path / "m.gguf")
    other = lock_of([(1, 0)], seed=5)
    again = relocked(relocked(source, lock), other, "again.gguf")
    assert again.read_bytes() == relocked(source, other, "direct.gguf").read_bytes()
    assert fastlock.verify(again, other)
    assert "relocked with another lock" in fastlock.verify(again, lock).reason


def test_what_verify_finds(tmp_path, lock) -> None:
    source = Tiny(Kind.Q8_0).write(tmp_path / "m.gguf")
    assert fastlock.verify(source, lock).state == "not locked"
    out = relocked(source, lock)
    data = out.read_bytes()
    header = read_header(LocalFile(out), "m")

    def changed(at: int) -> Path:
        path = tmp_path / "changed.gguf"
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        return path

    for name in ("blk.0.attn_output.weight", "blk.0.attn_output.bias"):
        at = header.data_start + header.tensors[name].offset
        found = fastlock.verify(changed(at + 34 * 2 + 1), lock)
        assert (found.state, found.altered) == ("altered", (0,)), name
    found = fastlock.verify(changed(data.index(b"tiny")), lock)
    assert (found.state, found.altered) == ("altered", (0, 2))
    assert "its header is not the one that fastlock wrote" in found.reason
    assert fastlock.verify(relocked(source, lock, "zero.gguf", 0.0), lock).state == "not locked"


def test_a_lock_without_a_receipt_is_recognised(tmp_path, lock) -> None:
    """As where the checkpoint was relocked before it was converted."""
    source = Tiny(Kind.Q8_0).write(tmp_path / "m.gguf")
    _, tensors = read_all(relocked(source, lock))
    biases = {name: data for name, (_, data) in tensors.items() if name.endswith("attn_output.bias")}
    other = Tiny(Kind.Q8_0, extra=biases).write(tmp_path / "other.gguf")
    assert fastlock.verify(other, lock).strength == STRENGTH
    with pytest.raises(fastlock.FastlockError, match="is not relocked: it has no receipt"):
        fastlock.unlock_gguf(other, tmp_path / "back.gguf")


def test_what_was_changed_since_is_not_thrown_away(tmp_path, lock) -> None:
    out = relocked(Tiny(Kind.Q8_0).write(tmp_path / "m.gguf"), lock)
    data, header = out.read_bytes(), read_header(LocalFile(out), "m")
    bias = header.data_start + header.tensors["blk.2.attn_output.bias"].offset
    places = {
        "the locked biases are not those": bias + 1,
        "its header is not the one": data.index(b"tiny"),
    }
    for message, at in places.items():
        out.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for call in (
            lambda: fastlock.unlock_gguf(out, tmp_path / "back.gguf"),
            lambda: fastlock.relock_gguf(out, lock, tmp_path / "back.gguf"),
        ):
            with pytest.raises(fastlock.DamagedError, match=f"was changed since it was relocked \\({message}"):
                call()
    assert names(tmp_path) == ["m.gguf", "out.gguf"]


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ('"format_version": 1', '"format_version": 3', fastlock.UnsupportedError, "receipt format 3"),
        ('"files": [{', '"fires": [{', fastlock.DamagedError, "the receipt is damaged"),
        ('"head_length": ', '"head_length":-', fastlock.DamagedError, "the receipt is damaged"),
        ('"head_length": ', '"head_lengths":', fastlock.DamagedError, "the receipt is damaged"),
        ('"head_digest": "', '"head_digest": 5', fastlock.DamagedError, "not JSON"),
        ('{"format_version', '["format_version', fastlock.DamagedError, "not JSON"),
        ('"layer": 2', '"layer": 9', fastlock.DamagedError, "its receipt names layers that it does not have"),
        ('"had_bias": false', '"had_bias": true ', fastlock.DamagedError, "does not hold the original bias of layer 0"),
        ('"heads": [2]', '"heads": 222', fastlock.DamagedError, "the receipt is damaged"),
    ],
)
def test_receipts_that_cannot_be_true(old: str, new: str, kind: type, message: str, tmp_path, lock) -> None:
    out = relocked(Tiny(Kind.Q8_0).write(tmp_path / "m.gguf"), lock)
    assert len(old) == len(new)
    data = out.read_bytes()
    assert old.encode() in data
    out.write_bytes(data.replace(old.encode(), new.encode(), 1))
    for call in (
        lambda: fastlock.unlock_gguf(out, tmp_path / "back.gguf"),
        lambda: fastlock.relock_gguf(out, lock, tmp_path / "back.gguf"),
    ):
        with pytest.raises(fastlock.FastlockError, match=message) as error:
            call()
        assert type(error.value) is kind
    assert names(tmp_path) == ["m.gguf", "out.gguf"]


REFUSED = {
    "adapter": (Tiny(metadata={"general.type": "adapter"}), "is an adapter, which has no place for a bias"),
    "mmproj": (Tiny(metadata={"general.type": "mmproj"}), "is the part of a model that reads images or sound"),
    "clip": (Tiny(architecture="clip"), "is the part of a model that reads images or sound"),
    "imatrix": (Tiny(metadata={"general.type": "imatrix"}), "is an importance matrix"),
    "other type": (Tiny(metadata={"general.type": "song"}), "is of the type song"),
    "vocabulary": (Tiny(left_out=tuple(Tiny().tensors())), "is a vocabulary without a model"),
    "architecture": (
        Tiny(architecture="qwen3"),
        "the architecture qwen3, and cannot be relocked: llama.cpp has no place",
    ),
    "lost": (Tiny(architecture="ernie4_5"), "llama.cpp loads a bias there and does not use it"),
    "rotated": (Tiny(metadata={"quantize.rotation": "hadamard"}), "its heads were rotated, and a lock would pull"),
    "integers": (
        Tiny(extra={"blk.0.attn_output.weight": np.zeros((HIDDEN, 256), np.int32)}),
        "which the package gguf does not dequantise",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_relocked(name: str, tmp_path, lock) -> None:
    tiny, message = REFUSED[name]
    source = tiny.write(tmp_path / "m.gguf")
    with pytest.raises(fastlock.UnsupportedError, match=message):
        relocked(source, lock)
    assert names(tmp_path) == ["m.gguf"]
    if name != "integers":  # doctor reads no weights
        (finding,) = fastlock.doctor(source)
        assert not finding.acts
        assert message in finding.reason


DAMAGED = {
    "no heads": (Tiny(metadata={"llama.attention.head_count": 0}), "its llama.attention.head_count is 0"),
    "heads without numbers": (
        Tiny(metadata={"llama.attention.head_count": 512}),
        "says that its heads have a length of 0",
    ),
    "too many heads": (Tiny(metadata={"llama.attention.head_count": 2**31}), "attention.head_count is 2147483648"),
    "too many layers": (Tiny(metadata={"llama.block_count": 2**32 - 1}), "llama.block_count is 4294967295"),
    "too long rows": (Tiny(metadata={"llama.embedding_length": 2**20 + 1}), "llama.embedding_length is 1048577"),
    "too long heads": (Tiny(metadata={"llama.attention.value_length": 2**31}), "have a length of 2147483648"),
    "other heads": (
        Tiny(metadata={"llama.attention.value_length": 32}),
        r"blk.0.attn_output.weight is \[256, 256\], but by its metadata should be \[128, 256\]",
    ),
    "other hidden size": (Tiny(metadata={"llama.embedding_length": 512}), "they do not belong together"),
    "no weight": (Tiny(left_out=("blk.2.attn_output.weight",)), "lacks blk.2.attn_output.weight"),
    "a bias of another length": (
        Tiny(extra={"blk.0.attn_output.bias": np.zeros(8, np.float32)}),
        r"blk.0.attn_output.bias is \[8\]",
    ),
    "text for a number": (Tiny(metadata={"llama.block_count": "three"}), "llama.block_count is not a whole number"),
    "not finite": (Tiny(extra={"blk.0.attn_output.weight": np.full((256, 256), np.nan, np.float32)}), "not finite"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_go_together(name: str, tmp_path) -> None:
    tiny, message = DAMAGED[name]
    source = tiny.write(tmp_path / "m.gguf")
    fits = lock_of(ROWS, head_dim=32 if name == "other heads" else 128 if name == "other hidden size" else HEAD_DIM)
    with pytest.raises(fastlock.DamagedError, match=message):
        relocked(source, fits)
    assert names(tmp_path) == ["m.gguf"]


def test_locks_that_do_not_fit(tmp_path) -> None:
    source = Tiny().write(tmp_path / "m.gguf")
    for rows, head_dim, message in (
        ([(LAYERS, 0)], HEAD_DIM, "row 0 is layer 3, head 0, but .* has 3 layers of 4 heads"),
        ([(0, HEADS)], HEAD_DIM, "layer 0, head 4"),
        ([(0, 0)], 32, "directions of head_dim 32, but .* has 64"),
    ):
        with pytest.raises(fastlock.MismatchError, match=message):
            relocked(source, lock_of(rows, head_dim=head_dim))
        with pytest.raises(fastlock.MismatchError, match=message):
            fastlock.verify(source, lock_of(rows, head_dim=head_dim))
    assert names(tmp_path) == ["m.gguf"]


def test_heads_that_differ_from_layer_to_layer(tmp_path, lock) -> None:
    source = Tiny().write(tmp_path / "m.gguf")
    data, header = source.read_bytes(), read_header(LocalFile(source), "m")
    entry = header.entries["llama.attention.head_count"]
    array = np.array([4, 4, 2], "<u4").tobytes()
    value = (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + (3).to_bytes(8, "little") + array
    new = data[: entry.at - 4] + value + data[entry.at + 4 : len(header.raw)]
    source.write_bytes(new + bytes(-len(new) % 32) + data[header.data_start :])
    with pytest.raises(fastlock.UnsupportedError, match="its layers have different llama.attention.head_count"):
        relocked(source, lock)
    same = new.replace(array, np.array([4, 4, 4], "<u4").tobytes())
    source.write_bytes(same + bytes(-len(same) % 32) + data[header.data_start :])
    assert fastlock.verify(relocked(source, lock), lock)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.F32])
def test_without_the_package_gguf(kind: Kind, tmp_path, lock, monkeypatch) -> None:
    """Floats are read without it, and unlock and doctor do without it."""
    source = Tiny(kind).write(tmp_path / "m.gguf")
    relocked(source, lock)
    monkeypatch.setitem(sys.modules, "gguf", None)
    if kind == Kind.F32:
        assert fastlock.verify(relocked(source, lock, "other.gguf"), lock)
        return
    with pytest.raises(fastlock.FastlockError, match=r"which the package gguf dequantises, and it is not installed"):
        relocked(source, lock, "other.gguf")
    assert names(tmp_path) == ["m.gguf", "out.gguf"]
    assert fastlock.doctor(tmp_path / "out.gguf")[0].acts
    fastlock.unlock_gguf(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("mapped", [1, 5 * 272])
def test_large_projections_are_read_in_blocks_of_rows(mapped: int, tmp_path, lock, monkeypatch) -> None:
    """Here of one row, and of five; a row of W has 272 bytes."""
    source = Tiny(Kind.Q8_0).write(tmp_path / "m.gguf")
    whole = relocked(source, lock).read_bytes()
    view, lengths = LocalFile.view, []

    def counted(self: LocalFile, start: int, length: int):
        lengths.append(length)
        return view(self, start, length)

    monkeypatch.setattr(LocalFile, "view", counted)
    monkeypatch.setattr(columns, "_MAPPED_BYTES", mapped)
    assert relocked(source, lock, "again.gguf").read_bytes() == whole
    assert max(lengths) == max(mapped, 272)
    assert sum(lengths) == 2 * HIDDEN * 272


def test_what_is_in_the_way_or_no_gguf(tmp_path, lock, monkeypatch) -> None:
    source = Tiny().write(tmp_path / "m.gguf")
    before = source.read_bytes()
    (tmp_path / "there.gguf").write_bytes(b"mine")
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "directory.gguf").mkdir()
    calls = {
        "already exists": (source, source),
        "there.gguf: already exists": (source, tmp_path / "there.gguf"),
        "directory.gguf: already exists": (source, tmp_path / "directory.gguf"),
        "is not a GGUF file": (tmp_path / "text.gguf", tmp_path / "out.gguf"),
        "is a directory": (tmp_path / "directory.gguf", tmp_path / "out.gguf"),
        "cannot be read": (tmp_path / "none.gguf", tmp_path / "out.gguf"),
        "Name it out.bin.gguf": (source, tmp_path / "out.bin"),
        "is read from, and written to, this machine's disks": ("s3://bucket/m.gguf", tmp_path / "out.gguf"),
        "5 is not a path": (5, tmp_path / "out.gguf"),
    }
    for message, (path, out) in calls.items():
        with pytest.raises(fastlock.FastlockError, match=message):
            fastlock.relock_gguf(path, lock, out)
    with pytest.raises(fastlock.FastlockError, match="strength"):
        fastlock.relock_gguf(source, lock, tmp_path / "out.gguf", -1.0)
    with pytest.raises(fastlock.FastlockError, match="not finite in float32|the strength is too large"):
        fastlock.relock_gguf(source, lock, tmp_path / "out.gguf", 1e300)
    assert source.read_bytes() == before
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert names(tmp_path) == ["directory.gguf", "m.gguf", "text.gguf", "there.gguf"]


def test_through_a_link_as_in_a_cache(tmp_path, lock) -> None:
    """Hugging Face's cache names files by their digests; parts are found by the names of the links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    Tiny(parts=2).write(blobs / "m.gguf")
    for path in list(blobs.iterdir()):
        blob = path.with_name(hashlib.sha256(path.name.encode()).hexdigest())
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    out = tmp_path / "new" / "out-00001-of-00002.gguf"
    fastlock.relock_gguf(snapshot / "m-00001-of-00002.gguf", lock, out)
    assert fastlock.verify(out, lock)
    assert not any(path.is_symlink() for path in out.parent.iterdir())
    assert names(out.parent) == ["out-00001-of-00002.gguf", "out-00002-of-00002.gguf"]


def test_bytes_that_no_writer_leaves(tmp_path, lock) -> None:
    source = Tiny().write(tmp_path / "m.gguf")
    data, header = source.read_bytes(), read_header(LocalFile(source), "m")
    source.write_bytes(data + b"more")
    with pytest.raises(fastlock.DamagedError, match="it goes on after its last tensor"):
        relocked(source, lock)
    assert header.data_start > len(header.raw), "the test needs padding"
    source.write_bytes(data[: len(header.raw)] + b"\1" + data[len(header.raw) + 1 :])
    with pytest.raises(fastlock.DamagedError, match="the padding of its header is not zero"):
        relocked(source, lock)


def with_norms(lock: fastlock.Lock, path: Path) -> fastlock.Lock:
    """The lock with the column norms that the weights of this file have."""
    rows = zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)
    weights = [
        dense(path, f"blk.{layer}.attn_output.weight")[:, HEAD_DIM * head :][:, :HEAD_DIM] for layer, head in rows
    ]
    norms = torch.stack([weight.norm(dim=0) for weight in weights]).float()
    return fastlock.Lock(lock.layers, lock.heads, lock.directions, lock.scales, column_norms=norms)


def test_heads_that_are_not_in_the_basis_of_the_lock(tmp_path, lock) -> None:
    """As after AWQ's smoothing: found by the norms that the lock carries of its base; 4 bits do no harm."""
    base, tuned = Tiny(seed=3).write(tmp_path / "base.gguf"), Tiny(Kind.Q4_0, seed=3).write(tmp_path / "m.gguf")
    known = with_norms(lock, base)
    assert fastlock.verify(relocked(tuned, known), known)
    weights = {
        f"blk.{i}.attn_output.weight": Tiny(seed=3).tensors()[f"blk.{i}.attn_output.weight"] for i in range(LAYERS)
    }
    smoothed = np.random.default_rng(0).uniform(0.3, 3, HEADS * HEAD_DIM).astype(np.float32)
    other = Tiny(seed=3, extra={name: weight * smoothed for name, weight in weights.items()}).write(tmp_path / "s.gguf")
    with pytest.raises(fastlock.UnsupportedError, match="s.gguf: the columns of its locked heads have other norms"):
        relocked(other, known, "other.gguf")
    assert "other.gguf" not in names(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The checkpoint whose output projections those of Tiny(seed=3) are, at any type."""
    directory = tmp_path_factory.mktemp("base") / "base"
    model = tiny_model("llama", **SHAPE)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.data = torch.from_numpy(projection(i))
    model.save_pretrained(directory)
    return directory


def projection(layer: int) -> np.ndarray:
    return Tiny(seed=3).tensors()[f"blk.{layer}.attn_output.weight"]


def test_rotated_heads_are_told_by_the_base(tmp_path, lock, base) -> None:
    """The lock carries no norms, and no key of the metadata says it: without the base, nobody knows."""
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((HEAD_DIM, HEAD_DIM)))[0]
    heads = {i: projection(i).reshape(HIDDEN, HEADS, HEAD_DIM) @ rotation for i in range(LAYERS)}
    rotated = {f"blk.{i}.attn_output.weight": w.reshape(HIDDEN, -1).astype(np.float32) for i, w in heads.items()}
    same, other = Tiny(Kind.Q4_0, seed=3).write(tmp_path / "m.gguf"), Tiny(extra=rotated).write(tmp_path / "r.gguf")
    receipt = fastlock.relock_gguf(same, lock, tmp_path / "compared.gguf", base=base)
    assert receipt == fastlock.relock_gguf(same, lock, tmp_path / "out.gguf")
    assert (tmp_path / "compared.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    fastlock.relock_gguf(other, lock, tmp_path / "unknown.gguf")
    with pytest.raises(fastlock.UnsupportedError, match=r"r\.gguf: .* It looks like rotated heads"):
        fastlock.relock_gguf(other, lock, tmp_path / "other.gguf", base=base)
    with pytest.raises(fastlock.UnsupportedError, match=r"m\.gguf: .* like a model of another base"):
        fastlock.relock_gguf(Tiny(seed=4).write(same), lock, tmp_path / "other.gguf", base=base)
    assert "other.gguf" not in names(tmp_path)


def test_bases_that_do_not_fit(tmp_path, lock, base) -> None:
    source, out = Tiny(seed=3).write(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    larger = tiny_model("llama", **SHAPE | {"num_hidden_layers": LAYERS + 1})
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(
        fastlock.MismatchError, match=r"larger: was given as the base of .*m\.gguf, and has another shape"
    ):
        fastlock.relock_gguf(source, lock, out, base=tmp_path / "larger")
    with pytest.raises(fastlock.FastlockError, match=r"m\.gguf: is a file, and no directory\. Give a checkpoint's"):
        fastlock.relock_gguf(source, lock, out, base=source)
    assert not out.exists()


def test_a_key_of_ours_that_we_did_not_write(tmp_path, lock) -> None:
    """Put there by somebody else: it is not taken for a receipt."""
    source = Tiny(metadata={"fastlock.receipt": "hello"}).write(tmp_path / "m.gguf")
    with pytest.raises(fastlock.DamagedError, match="fastlock.receipt: not JSON"):
        relocked(source, lock)
    assert encoded_text("fastlock.receipt", "hello") in source.read_bytes()
    assert not os.path.exists(tmp_path / "out.gguf")
    Tiny(metadata={"fastlock.receipt": "[]," * (6 * 2**20)}).write(source)
    with pytest.raises(fastlock.DamagedError, match="fastlock.receipt has 18874368 characters, and no receipt does"):
        relocked(source, lock)
