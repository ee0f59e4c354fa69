"""Adapters of strangers, read safely: what is not sound is refused, and nothing is unpickled or left unbounded."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter, plain_path
from fastlock.checkpoints.adapters.folding import BasePart, fold_adapter
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError
from fastlock.storage.files import InMemoryFile
from fastlock.storage.places import files_in
from tests.helpers.adapters import (
    config_of,
    read_adapter,
    rewrite_config,
    rewrite_tensors,
    save_adapter,
)

SITE = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save_adapter(config_of("lora"), tmp_path / "adapter")


def fold(directory: Path, part: BasePart, **keys: Any) -> Any:
    return fold_adapter(read_adapter(directory), part.checkpoint, part.lock, part=part, **keys)


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def test_says_what_it_is(lora: Path) -> None:
    adapter = read_adapter(rewrite_config(lora, base_model_name_or_path="the/base"))
    assert (adapter.method, adapter.base) == ("LORA", "the/base")
    assert len(adapter.modules) == 9  # three in each of three layers
    assert set(adapter.modules["model.layers.0.self_attn.o_proj"]) == {"lora_A.weight", "lora_B.weight"}
    assert set(adapter.tensors) == {
        f"base_model.model.{path}.{name}" for path, names in adapter.modules.items() for name in names
    }


def test_reads_it_at_a_url(lora: Path, part: BasePart) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in lora.iterdir():
        memory.pipe(f"/zoo/adapter/{path.name}", path.read_bytes())
    url = "memory://zoo/adapter"
    there = fold_adapter(open_adapter(files_in(url, any_directory=True), url), part.checkpoint, part.lock, part=part)
    here = fold(lora, part)
    assert all(torch.equal(a.bias, b.bias) and a.digest == b.digest for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.model.layers", "model.model.language_model.layers"),
        ("model.model.layers", "model.language_model.model.layers"),
        ("model.model.layers", "model.layers"),
    ],
)
def test_other_classes_call_the_same_module_otherwise(old: str, new: str, lora: Path, part: BasePart) -> None:
    expected = fold(lora, part)
    folds = fold(rewrite_tensors(lora, renamed(old, new)), part)
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(folds, expected, strict=True))
    assert plain_path("vision_tower.model.layers.0.self_attn.o_proj") != plain_path("model.layers.0.self_attn.o_proj")


def test_a_pickle_is_refused_with_what_to_do(lora: Path) -> None:
    (lora / ADAPTER_WEIGHTS).rename(lora / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="a pickle.*save_pretrained"):
        read_adapter(lora)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_a_missing_file_is_named(name: str, lora: Path) -> None:
    (lora / name).unlink()
    with pytest.raises(FastlockError, match=f"holds no {name}"):
        read_adapter(lora)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": None},
        {"peft_type": 3},
        {"base_model_name_or_path": ["a"]},
        {"r": 0},
        {"r": "4"},
        {"r": True},
        {"r": 5},
        {"r": 10**30},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": "12"},
        {"lora_alpha": 10**30},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"rank_pattern": ["o_proj"]},
        {"rank_pattern": {"o_proj": 3}},
        {"rank_pattern": {"o_proj": "x"}},
        {"alpha_pattern": {"o_proj[": 2}},
        {"alpha_pattern": {"o_proj": None}},
    ],
    ids=str,
)
def test_a_config_that_is_not_sound_is_refused(change: dict[str, Any], lora: Path, part: BasePart) -> None:
    with pytest.raises(DamagedError, match=r"adapter"):
        fold(rewrite_config(lora, **change), part)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"peft_type": "LORA", "peft_type": "IA3"}', "twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"peft_type": "LORA", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 deep"),
        (b" " * (9 * 2**20), "larger than"),
    ],
    ids=["empty", "a list", "twice", "deep", "nested", "long"],
)
def test_a_config_that_is_no_object_is_refused(data: bytes, says: str, lora: Path) -> None:
    (lora / ADAPTER_CONFIG).write_bytes(data)
    with pytest.raises(DamagedError, match=says):
        read_adapter(lora)


def test_a_rank_that_tensors_disagree_on_is_refused(lora: Path, part: BasePart) -> None:
    with pytest.raises(DamagedError, match=r"A is \[4, 128\] and B \[64, 3\].*rank 4"):
        fold(rewrite_tensors(lora, lambda t: t | {f"{SITE}.lora_B.weight": torch.ones(64, 3)}), part)


@pytest.mark.parametrize(
    "change",
    [
        {f"{SITE}.lora_A.weight": torch.ones(4, 64)},
        {f"{SITE}.lora_B.weight": torch.ones(63, 4)},
        {f"{SITE}.lora_A.weight": torch.ones(4, 128, 1)},
    ],
    ids=["A", "B", "dimensions"],
)
def test_a_projection_of_another_shape_is_refused(change: Any, lora: Path, part: BasePart) -> None:
    with pytest.raises(MismatchError, match=r"layers.0.self_attn.o_proj.*over this base it is"):
        fold(rewrite_tensors(lora, lambda tensors: tensors | change), part)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_that_is_not_read_is_refused(dtype: torch.dtype, lora: Path, part: BasePart) -> None:
    name = f"{SITE}.lora_A.weight"
    with pytest.raises(UnsupportedError, match="save the adapter in one of them"):
        fold(rewrite_tensors(lora, lambda tensors: tensors | {name: tensors[name].to(dtype)}), part)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float, lora: Path, part: BasePart) -> None:
    name = f"{SITE}.lora_B.weight"
    with pytest.raises(DamagedError, match=r"layer 0 is not finite"):
        fold(rewrite_tensors(lora, lambda tensors: tensors | {name: torch.full((64, 4), value)}), part)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.0.self_attn.o_proj", "layers.7.self_attn.o_proj"),
        ("o_proj", "out_proj"),
        ("model.layers.0", "decoder.block.0"),
        ("model.layers.0.self_attn.o_proj", "../../../etc/passwd"),
        ("layers.0.self_attn.o_proj", "layers.00.self_attn.o_proj"),
    ],
)
def test_a_module_that_the_base_lacks_is_named(old: str, new: str, lora: Path, part: BasePart) -> None:
    with pytest.raises(MismatchError, match="no such module"):
        fold(rewrite_tensors(lora, renamed(old, new)), part)


@pytest.mark.parametrize("new", ["model.layers", "layers", "module.base_model.model.model.layers"])
def test_a_name_that_peft_does_not_find_is_refused(new: str, lora: Path, part: BasePart) -> None:
    with pytest.raises(DamagedError, match="not named as PEFT names"):
        fold(rewrite_tensors(lora, renamed("base_model.model.model.layers", new)), part)


def test_two_paths_of_one_module_are_refused(lora: Path, part: BasePart) -> None:
    other = SITE.replace("model.layers", "language_model.layers")
    both = rewrite_tensors(lora, lambda t: t | {f"{other}.lora_A.weight": t[f"{SITE}.lora_A.weight"] + 1})
    with pytest.raises(DamagedError, match="two paths of one module"):
        fold(both, part)


@pytest.mark.parametrize("name", ["lora_A.other.weight", "lora_magnitude_vector", "lora_C.weight"])
def test_what_peft_would_not_load_is_refused(name: str, lora: Path, part: BasePart) -> None:
    with pytest.raises(UnsupportedError, match=f"{name}, which its config does not speak of"):
        fold(rewrite_tensors(lora, lambda tensors: tensors | {f"{SITE}.{name}": torch.ones(64)}), part)


def test_a_tensor_too_large_for_any_module_is_not_read(part: BasePart, tmp_path: Path) -> None:
    """Of a sparse file, which takes no disk, nothing but the header is read."""
    names = {"lora_A.weight": [2**31, 128], "lora_B.weight": [64, 2**31]}
    header, end = {}, 0
    for name, shape in names.items():
        size = shape[0] * shape[1] * 2
        header[f"{SITE}.{name}"] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with (tmp_path / ADAPTER_WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2**31, "lora_alpha": 1}))
    with pytest.raises(DamagedError, match="no module has one"):
        fold(tmp_path, part)


def test_a_method_of_peft_asks_for_no_memory_that_its_tensors_do_not_take(part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("loha"), tmp_path / "loha")
    with pytest.raises(DamagedError, match=r"by its config it is \[64, 1073741824\]"):
        fold(rewrite_config(directory, r=2**30), part)
    directory = save_adapter(config_of("vera by its seed"), tmp_path / "vera")
    with pytest.raises(DamagedError, match="gives the rank '1073741824'"):
        fold(rewrite_config(directory, r=2**30), part)
    directory = save_adapter(config_of("vblora of its best", vector_length=1), tmp_path / "vblora")
    rewrite_tensors(directory, lambda t: {key: torch.zeros(2**18, 1) if "bank" in key else t[key] for key in t})
    with pytest.raises(DamagedError, match="asks for 201332544 numbers more than its tensors hold"):
        fold(rewrite_config(directory, num_vectors=2**18), part)


def test_a_rank_of_adalora_asks_for_no_memory(part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of("adalora"), tmp_path / "adapter")
    with pytest.raises(MismatchError, match=r"over this base it is \[1099511627776, 128\]"):
        fold(rewrite_config(directory, init_r=2**40, rank_pattern={"elsewhere": [True]}), part)


@pytest.mark.parametrize(("row", "number"), [(0, 64), (1, 128), (0, -1), (1, 2**30), (1, -(2**31))])
def test_places_outside_the_projection_are_refused(row: int, number: int, part: BasePart, tmp_path: Path) -> None:
    """PEFT would read memory there."""
    directory = save_adapter(config_of("shira"), tmp_path / "adapter")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{SITE}.shira_indices"][row, 3] = number
        return tensors

    with pytest.raises(DamagedError, match="shira_indices names numbers that its projection does not have"):
        fold(rewrite_tensors(directory, change), part)


def test_what_a_config_says_is_escaped(part: BasePart, tmp_path: Path) -> None:
    directory = rewrite_config(save_adapter(config_of("vera"), tmp_path / "adapter"), r="\x1b[2J" * 1000)
    with pytest.raises(DamagedError, match=r"but its config says rank '\\x1b\[2J") as error:
        fold(directory, part)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("kind", "name"),
    [("oft", "num_cayley_neumann_terms"), ("boft", "boft_n_butterfly_factor"), ("peanut", "depth")],
)
def test_a_config_does_not_say_how_long_it_takes(kind: str, name: str, part: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of(kind), tmp_path / "adapter")
    with pytest.raises(DamagedError, match=f"gives 1048576 for {name}"):
        fold(rewrite_config(directory, **{name: 2**20}), part)


MUTATED = ("lora", "patterns", "adalora", "vera", "ia3 of the output", "loha", "modules to save")


@pytest.mark.parametrize("kind", MUTATED)
def test_bytes_changed_at_random(kind: str, part: BasePart, tmp_path: Path) -> None:
    """Whatever is changed, it is folded or refused by a fastlock error."""
    directory = save_adapter(config_of(kind), tmp_path / "adapter")
    refused = sweep(directory, part, 40, seed=len(kind))
    assert refused > 4


def sweep(directory: Path, part: BasePart, count: int, seed: int) -> int:
    """Fold so many mutations of an adapter, its weights held in memory; how many were refused."""
    rng, refused = random.Random(seed), 0
    originals = {name: (directory / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    (length,) = struct.unpack("<Q", originals[ADAPTER_WEIGHTS][:8])
    for _ in range(count):
        files = dict(originals)
        name = rng.choice(sorted(files))
        files[name] = mutated(files[name], rng, 8 + length if name == ADAPTER_WEIGHTS else len(files[name]))
        try:
            adapter = open_adapter({name: InMemoryFile(data) for name, data in files.items()}, "mutated")
            folds = fold_adapter(adapter, part.checkpoint, part.lock, part=part)
            assert all(bool(fold.bias.isfinite().all()) for fold in folds)
        except FastlockError:
            refused += 1
    return refused


def mutated(data: bytes, rng: random.Random, header: int) -> bytes:
    """Some bytes in the first `header`, or of all, changed, cut out, doubled, or a number in them made another."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(header if rng.random() < 0.9 else len(changed))
        at = min(at, len(changed) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 9)]
        elif digits := [i for i in range(at, min(at + 200, len(changed))) if chr(changed[i]).isdigit()]:
            changed[digits[0]] = ord(rng.choice("0123456789-e."))
    return bytes(changed)
