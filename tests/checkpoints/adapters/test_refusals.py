"""What is refused of adapters, in words that help, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fastlock
from fastlock.checkpoints.adapters.folding import BasePart
from tests.helpers.adapters import base_model, config_of, rewrite_config, rewrite_tensors, save_adapter
from tests.helpers.families import random_lock, tiny_model
from tests.helpers.relocked_adapters import contents, quantised_base

HERE = {"stacks": ["transformers"]}


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(config_of("lora"), tmp_path_factory.mktemp("lora") / "adapter")


def refused(directory: Path, match: str, call: Callable[[], Any], kind: Any = fastlock.FastlockError) -> None:
    """The call is refused, and leaves everything as it was."""
    before = contents(directory)
    with pytest.raises(kind, match=match):
        call()
    assert contents(directory) == before
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("kind", "changes", "asked", "match"),
    [
        ("dora", {}, {}, r"nothing keeps the lock exactly.*no such bias with use_dora.*--carrier sidecar"),
        ("vera", {}, HERE, r"no such bias in the method VERA"),
        ("lora", {}, {"carrier": "adapter bias"}, r"vllm loads no biases of an adapter.*--for transformers \(adapter"),
        ("elsewhere", {"bias": "all"}, {"carrier": "base bias"}, r"vllm loads no adapter with bias = 'all'"),
        ("lora", {}, {"carrier": "folklore"}, r"choose one of base bias, adapter bias"),
        ("lora", {}, {"gap": -1.0}, r"gap is -1.0"),
        ("lora", {}, {"stacks": ["tgi"]}, r"give a list of serving stacks"),
        ("rslora", {}, {"carrier": "sidecar", "stacks": ["vllm", "sglang"]}, r"s = 6, and sglang with s = 3"),
        ("elsewhere", {"layer_replication": [[0, 2], [1, 3]]}, {}, r"more than once"),
    ],
    ids=str,
)
def test_what_no_carrier_brings_is_refused_with_what_would(
    kind: str, changes: Any, asked: Any, match: str, base: Path, part: BasePart, tmp_path: Path
) -> None:
    source = rewrite_config(save_adapter(config_of(kind), tmp_path / "adapter"), **changes)
    refused(tmp_path, match, lambda: fastlock.relock_adapter(source, base, part.lock, tmp_path / "out", **asked))


def test_a_base_of_another_shape_or_relocked_or_quantised(base: Path, lora: Path, part: BasePart, tmp_path) -> None:
    lock = part.lock
    base_model(tmp_path / "other", hidden_size=32)
    fastlock.relock_checkpoint(base, lock, tmp_path / "locked")
    fastlock.relock_checkpoint(base, lock, tmp_path / "otherwise", 1.0)
    quantised = quantised_base(base, tmp_path / "quantised")
    for at, match in (
        ("other", r"is for a weight of \[64, 96\], and .*other has one of \[32, 96\]"),
        ("locked", r"the base is relocked, and the lock would act twice"),
        ("otherwise", r"another lock or strength"),
        ("quantised", r"the base is quantised, and merging would round it anew"),
    ):
        refused(tmp_path, match, lambda at=at: fastlock.relock_adapter(lora, tmp_path / at, lock, tmp_path / "out"))
    source = tmp_path / "adapter"
    shutil.copytree(lora, source)
    rewrite_config(source, base_model_name_or_path=str(quantised))
    refused(
        tmp_path,
        "quantised otherwise",
        lambda: fastlock.relock_adapter(source, base, lock, tmp_path / "out", **HERE),
        fastlock.MismatchError,
    )


def test_a_lock_of_another_geometry(base: Path, lora: Path, tmp_path: Path) -> None:
    lock = random_lock(tiny_model("llama", num_hidden_layers=5))
    refused(tmp_path, "", lambda: fastlock.relock_adapter(lora, base, lock, tmp_path / "out"), fastlock.MismatchError)


def test_places_that_are_taken_or_not_for_an_adapter(base: Path, lora: Path, part: BasePart, tmp_path: Path) -> None:
    lock, source = part.lock, tmp_path / "adapter"
    shutil.copytree(lora, source)
    (tmp_path / "taken").mkdir()
    for out, match in (
        (tmp_path / "taken", "already exists"),
        (source / "in", "is inside the checkpoint itself"),
        ("memory://bucket/out", "adapters are written to this machine only"),
    ):
        refused(tmp_path, match, lambda out=out: fastlock.relock_adapter(source, base, lock, out, **HERE))
    (source / "fastlock.safetensors").write_bytes(b"")
    refused(
        tmp_path,
        "fastlock needs that name",
        lambda: fastlock.relock_adapter(source, base, lock, tmp_path / "out", **HERE),
    )
    for call in (
        lambda: fastlock.unlock_checkpoint(source, tmp_path / "out"),
        lambda: fastlock.unlock_checkpoint(source, source, in_place=True),
        lambda: fastlock.relock_checkpoint(source, lock, tmp_path / "out"),
    ):
        refused(tmp_path, "not relocked|not changed in place|Give the base", call)


def test_a_failure_while_writing_leaves_nothing(base: Path, lora: Path, part: BasePart, tmp_path, monkeypatch) -> None:
    def failing(*_: Any, **_keys: Any) -> None:
        raise OSError("no space left")

    for asked, broken in (
        (HERE, "fastlock.storage.new_directory.NewDirectory.write_parts"),
        ({}, "fastlock.checkpoints.adapters.relocking.relock_checkpoint"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(broken, failing)
            refused(
                tmp_path,
                "cannot be written",
                lambda asked=asked: fastlock.relock_adapter(lora, base, part.lock, tmp_path / "out", **asked),
            )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data | {"carrier": "glue"},
        lambda data: data | {"sites": []},
        lambda data: data | {"extra": 1},
        lambda data: data | {"written": {"adapter_config.json": "0"}},
        lambda data: data | {"original": data["original"] | {"adapter_model.safetensors": "0" * 64}},
        lambda data: data | {"format_version": 2},
        lambda data: [data],
    ],
    ids=range(7),
)
def test_a_damaged_receipt_is_refused(damage: Any, base: Path, lora: Path, part: BasePart, tmp_path: Path) -> None:
    fastlock.relock_adapter(lora, base, part.lock, tmp_path / "locked", **HERE)
    path = tmp_path / "locked" / "fastlock.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    refused(tmp_path, "", lambda: fastlock.unlock_checkpoint(tmp_path / "locked", tmp_path / "out"))


def test_no_byte_of_a_relocked_adapter_makes_more_than_a_fastlock_error(
    base: Path, lora: Path, part: BasePart, tmp_path: Path
) -> None:
    """15 mutations of each file that fastlock reads of a relocked adapter; 10,000 were run by hand."""
    fastlock.relock_adapter(lora, base, part.lock, tmp_path / "locked", **HERE)
    random = np.random.default_rng(3)
    names = [name for name in contents(tmp_path / "locked") if name != "README.md"]
    for name in names:
        path = tmp_path / "locked" / name
        data = path.read_bytes()
        for _ in range(15):
            mutate(path, data, random)
            for i, call in enumerate((unlocked, verified)):
                try:
                    call(tmp_path, base, part.lock)
                except fastlock.FastlockError:
                    assert not (tmp_path / "out").exists(), (name, i)
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path.write_bytes(data)


def mutate(path: Path, data: bytes, random: np.random.Generator) -> None:
    """Other bytes, fewer, or more of them; where a file is text or has a header, most of it there."""
    array = bytearray(data)
    kind, at = random.integers(4), int(random.integers(min(len(data), 4000)))
    if kind == 0:
        array = array[:at]
    elif kind == 1:
        array[at:at] = random.bytes(8)
    else:
        array[at : at + 1] = random.bytes(1) if kind == 2 else b"0"
    path.write_bytes(bytes(array))


def unlocked(directory: Path, _base: Path, _lock: fastlock.Lock) -> None:
    fastlock.unlock_checkpoint(directory / "locked", directory / "out")


def verified(directory: Path, base: Path, lock: fastlock.Lock) -> None:
    fastlock.verify(directory / "locked", lock, base=base)


def test_a_tensor_that_is_not_finite_or_too_large_for_its_dtype(
    base: Path, lora: Path, part: BasePart, tmp_path
) -> None:
    source = tmp_path / "adapter"
    shutil.copytree(lora, source)
    rewrite_tensors(source, lambda tensors: {key: tensor.to(torch.float16) for key, tensor in tensors.items()})
    refused(
        tmp_path,
        "not finite in torch.float16: the strength is too large",
        lambda: fastlock.relock_adapter(source, base, part.lock, tmp_path / "out", 1e9, **HERE),
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lora", {"lora_alpha": 10**400}),
        ("elsewhere", {"rank_pattern": [1], "carrier": "adapter bias"}),
        ("elsewhere", {"modules_to_save": 5}),
        ("elsewhere", {"modules_to_save": [{}]}),
        ("elsewhere", {"base_model_name_or_path": "x" * 5000}),
        ("elsewhere", {"base_model_name_or_path": "a\0b"}),
        ("elsewhere", {"base_model_name_or_path": "http://127.0.0.1:9/never/asked"}),
        ("elsewhere", {"target_modules": 7, "layers_to_transform": "no"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_config_makes_no_more_than_a_fastlock_error(
    kind: str, changes: dict[str, Any], base: Path, part: BasePart, tmp_path: Path
) -> None:
    source = rewrite_config(save_adapter(config_of(kind), tmp_path / "adapter"), **changes)
    calls = [
        lambda: fastlock.relock_adapter(source, base, part.lock, tmp_path / "out"),
        lambda: fastlock.relock_adapter(source, base, part.lock, tmp_path / "in", carrier="adapter bias", **HERE),
        lambda: fastlock.doctor(source, ["transformers", "vllm", "sglang", "llama.cpp"], base=base, lock=part.lock),
        lambda: fastlock.doctor(source, ["sglang"]),
        lambda: fastlock.verify(source, part.lock),
    ]
    outcomes = []
    for call in calls:
        try:
            call()
            outcomes.append("done")
        except fastlock.FastlockError:
            outcomes.append("refused")
    assert outcomes[-1] == "refused"  # no base is named that is here


def test_a_base_whose_heads_are_in_another_basis(base: Path, lora: Path, part: BasePart, tmp_path: Path) -> None:
    """As relocking the base itself would refuse it: the lock knows its own base's columns."""
    sites = {site.layer: part.whole_weight(site) for site in part.sites}
    rows = zip(part.lock.layers.tolist(), part.lock.heads.tolist(), strict=True)
    norms = torch.stack([sites[layer][:, 32 * head : 32 * (head + 1)].norm(dim=0) for layer, head in rows])
    lock = replace(part.lock, column_norms=norms.float())
    fastlock.relock_adapter(lora, base, lock, tmp_path / "fits", **HERE)
    smoothed = base_model(tmp_path / "smoothed")
    factors = torch.linspace(0.5, 2, 128)
    path = smoothed / "model.safetensors"
    tensors = {
        name: tensor * factors if name.endswith("o_proj.weight") else tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    refused(
        tmp_path,
        "a lock would pull|pull by another",
        lambda: fastlock.relock_adapter(lora, smoothed, lock, tmp_path / "out", **HERE),
        fastlock.UnsupportedError,
    )
