"""Adapters of every method, mutated: an error of fastlock's, or a fold of the right shape that is finite.

By default a few mutations each. `FASTLOCK_MUTATIONS=10000 pytest tests/checkpoints/adapters/test_mutations.py -s` makes
10,000 of each, and prints how many were refused.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastlock
from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from fastlock.checkpoints.adapters.folding import BasePart, base_part, fold_adapter
from fastlock.checkpoints.adapters.methods.markers import MARKERS
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.storage.files import InMemoryFile
from fastlock.storage.places import files_in
from tests.helpers.adapters import KINDS, base_model, config_of, save_adapter
from tests.helpers.families import random_lock, tiny_model

MUTATIONS = int(os.environ.get("FASTLOCK_MUTATIONS", "20"))
DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "U64", "F16", "BF16", "F32", "F64", "F8_E4M3", "C64", "F4", "X")
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
VALUES = (
    *(0, -1, 1, 3, 2**20, 2**31 - 1, 2**40, 10**400, 1.5, 1e-300, float("nan"), float("inf"), True, False, None),
    *("", "x", "../x", "all", "pissa", "true", [], [[]], ["o_proj"], [2**40], {}, {"o_proj": 2**30}, {"x": {}}, DEEP),
    *({".*": 3}, {"(.*)*x": 3}, {"(a|.)(a|.)(a|.)(a|.)(a|.)(a|.)(a|.)(a|.)(a|.)(a|.).*.*x": 3}, {"o_proj[": 3}),
)
# As two int32: large ones, negative ones, and the bits of infinity and of NaN.
EXTREMES = (0, 2**15, 2**31 - 1, -(2**31), -1, 0x7F800000, 0x7FC00000)
# Keys that a config of some method may have, and those of others.
KEYS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "peft_type", "bias", "lora_bias"),
    *("target_modules", "modules_to_save", "init_r", "alpha", "fan_in_fan_out", "layers_pattern", "auto_mapping"),
)
NAMES = ("../../x", "", "a.b", "\x1b[2J", "x" * 3000, "base_model.model.", "layers.00.", "ü")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> BasePart:
    """A base of one layer, whose projection is locked."""
    directory = base_model(tmp_path_factory.mktemp("base") / "base", num_hidden_layers=1)
    lock = random_lock(tiny_model("llama", num_hidden_layers=1))
    return base_part(Checkpoint(files_in(directory), "the base"), lock)


def parts_of(directory: Path) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
    """The header and the data of an adapter's weights, and its config."""
    weights = (directory / ADAPTER_WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, weights[8 + length :], json.loads((directory / ADAPTER_CONFIG).read_text())


def mutate(header: dict[str, Any], data: bytearray, config: dict[str, Any], rng: np.random.Generator) -> None:
    """One or two things are changed: numbers, a dtype, a shape, a name, which tensors there are, the config."""
    for _ in range(int(rng.integers(1, 3))):
        if not header:
            return
        names = sorted(header)
        at_site = [name for name in names if "o_proj" in name or "layers" not in name] or names
        name = str(rng.choice(at_site if rng.random() < 0.8 else names))
        entry, kind = header[name], int(rng.integers(0, 12))
        begin, end = entry["data_offsets"]
        if kind == 0 and begin < end <= len(data):
            for at in rng.integers(begin, end, 4):
                data[int(at)] = int(rng.integers(0, 256))
        elif kind == 1 and begin + 8 <= end <= len(data):
            at = begin + int(rng.integers(0, (end - begin) // 8)) * 8
            data[at : at + 8] = np.full(2, EXTREMES[int(rng.integers(0, len(EXTREMES)))], np.int32).tobytes()
        elif kind == 2:
            entry["dtype"] = str(rng.choice(DTYPES))
        elif kind == 3 and entry["shape"]:
            place = int(rng.integers(0, len(entry["shape"])))
            entry["shape"][place] = int(rng.choice([0, 1, 2, entry["shape"][place] + 1, 2**31, 2**62]))
        elif kind == 4:
            entry["shape"] = entry["shape"][::-1] if rng.integers(0, 2) else [1, *entry["shape"]]
        elif kind == 5:
            resize(header, data, name, rng)
        elif kind == 6:
            del header[name]
        elif kind == 7:
            add(header, data, other_name(name, rng), entry)
        elif kind == 8:
            header[other_name(name, rng)] = header.pop(name)
        elif kind == 9:
            entry["data_offsets"] = [begin + int(rng.integers(-9, 9)), end + int(rng.integers(-9, 9))]
        else:
            key = str(rng.choice(sorted(config) if kind == 10 else KEYS))
            config[key] = VALUES[int(rng.integers(0, len(VALUES)))]


def resize(header: dict[str, Any], data: bytearray, name: str, rng: np.random.Generator) -> None:
    """A tensor has one row or column more or less, or none at all, and the file says so truthfully."""
    entry = header.pop(name)
    shape, (begin, end) = list(entry["shape"]), entry["data_offsets"]
    numbers = math.prod(shape)
    if not numbers or not shape:
        return
    place = int(rng.integers(0, len(shape)))
    shape[place] = max(0, shape[place] + int(rng.choice([-shape[place], -1, 1])))
    length = math.prod(shape) * (end - begin) // numbers
    header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [len(data), len(data) + length]}
    data += (bytes(data[begin:end]) * 3)[:length].ljust(length, b"\0")


def add(header: dict[str, Any], data: bytearray, name: str, entry: dict[str, Any]) -> None:
    """One more tensor, like another one."""
    begin, end = entry["data_offsets"]
    header[name] = entry | {"data_offsets": [len(data), len(data) + end - begin]}
    data += bytes(data[begin:end]).ljust(end - begin, b"\0")


def other_name(name: str, rng: np.random.Generator) -> str:
    """A tensor's name as another layer, module, class or method would have it, or one that nobody would give."""
    begins = [marker for markers in MARKERS.values() for marker in markers]
    old, new = (
        ("layers.0", "layers.1"),
        ("o_proj", "q_proj"),
        ("o_proj", "../o_proj"),
        ("model.layers", "language_model.layers"),
        ("base_model.model.", ""),
        (".weight", ""),
        (name.rpartition(".")[2], str(rng.choice(begins)) + str(rng.choice(["A", "B", "l", "A.weight", "E", "bias"]))),
        (name.rpartition(".")[2], "base_layer.bias"),
        (name, str(rng.choice(NAMES))),
    )[int(rng.integers(0, 9))]
    return name.replace(old, new)


def files_of(header: dict[str, Any], data: bytes, config: dict[str, Any]) -> dict[str, InMemoryFile]:
    """The adapter's files; its data in the order of the header, without gaps, where that is what is wrong."""
    encoded = json.dumps(header).encode()
    weights = struct.pack("<Q", len(encoded)) + encoded + data
    files = {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: json.dumps(config).encode()}
    return {name: InMemoryFile(content) for name, content in files.items()}


def packed(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The same tensors one after the other: what was taken out leaves no gap that would be refused at once."""
    new, out = {}, bytearray()
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        new[name] = entry | {"data_offsets": [len(out), len(out) + end - begin]}
        out += data[max(0, begin) : max(0, end)]
    return new, bytes(out)


def outcome(files: dict[str, InMemoryFile], part: BasePart) -> tuple[str, str]:
    """What becomes of an adapter, and the message of its error."""
    try:
        adapter = open_adapter(files, "mutated")
        (fold,) = fold_adapter(adapter, part.checkpoint, part.lock, part=part)
    except fastlock.FastlockError as error:
        return type(error).__name__, str(error)
    assert (fold.bias.shape, fold.bias.dtype) == ((64,), torch.float64)
    assert bool(fold.bias.isfinite().all())
    return "folded", ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutation_is_refused_or_folds(kind: str, small: BasePart, tmp_path: Path) -> None:
    directory = save_adapter(config_of(kind), tmp_path / "adapter", num_hidden_layers=1)
    original, numbers, told = parts_of(directory)
    rng, seen = np.random.default_rng(0), Counter[str]()
    for _ in range(MUTATIONS):
        header, data, config = json.loads(json.dumps(original)), bytearray(numbers), json.loads(json.dumps(told))
        mutate(header, data, config, rng)
        if rng.random() < 0.9:
            header, data = packed(header, data)
        what, message = outcome(files_of(header, bytes(data), config), small)
        seen[what] += 1
        assert message.isprintable()
        assert len(message) < 2000
    print(f"\n{kind}: {dict(seen)}")
    assert seen["folded"]
    assert seen["DamagedError"]
