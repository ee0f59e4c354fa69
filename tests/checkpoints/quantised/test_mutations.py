"""Every reader of a quantised format against mutated tensors: an error of fastlock's, or columns of the right shape.

By default a few mutations each. `FASTLOCK_MUTATIONS=10000 pytest tests/checkpoints/quantised/test_mutations.py -s`
makes 10,000 of each, and prints how many were refused.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import fastlock
from fastlock.checkpoints.quantised import Settings, SiteTensors, quantised_at
from fastlock.checkpoints.tensor_index import read_shards
from fastlock.storage.local import local_files
from tests.checkpoints.quantised.test_formats import FORMATS, SITE

MUTATIONS = int(os.environ.get("FASTLOCK_MUTATIONS", "40"))
HIDDEN, WIDTH = 16, 64
READERS = {
    "GPTQ": "gptq act-order",
    "AWQ": "awq",
    "pack-quantized": "w4a16 asymmetric",
    "int8 a row": "w8a8",
    "FP8 a row": "fp8 a row",
    "FP8 blocks": "block fp8, small blocks",
    "NVFP4": "nvfp4",
    "NVFP4 of ModelOpt": "modelopt nvfp4",
    "MXFP4": "mxfp4",
    "bitsandbytes 4 bits": "nf4",
    "bitsandbytes 4 bits, plain scales": "nf4, absmax in float32",
    "bitsandbytes int8": "int8",
}
KEYS = ("bits", "version", "checkpoint_format", "weight_block_size", "config_groups", "group_size")
VALUES = (0, -1, 3, 2**40, "x", "", None, [], {}, [128], [0, 0], [1, 2**40], 4.5, True, {"a": {"weights": {"x": 1}}})


def file_of(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], bytearray]:
    """The header and the data of a safetensors file that holds a projection."""
    header: dict[str, Any] = {}
    data = bytearray()
    names = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16"}
    names |= {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    for suffix, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[f"{SITE}.{suffix}"] = entry | {"data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def mutate(header: dict[str, Any], data: bytearray, config: dict[str, Any], rng: np.random.Generator) -> None:
    """One or two things are changed: bytes, a dtype, a shape, a tensor's presence, an entry of the config."""
    for _ in range(int(rng.integers(1, 3))):
        name = str(rng.choice(sorted(header)))
        entry, kind = header[name], int(rng.integers(0, 7))
        if kind == 0 and data:
            begin, end = entry["data_offsets"]
            for at in rng.integers(begin, max(end, begin + 1), 4):
                data[min(int(at), len(data) - 1)] = int(rng.integers(0, 256))
        elif kind == 1:
            entry["dtype"] = str(rng.choice(["U8", "I8", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "I16"]))
        elif kind == 2 and entry["shape"]:
            place = int(rng.integers(0, len(entry["shape"])))
            entry["shape"][place] = int(rng.choice([0, 1, 2, entry["shape"][place] + 1, 2**31, 2**62]))
        elif kind == 3:
            entry["shape"] = entry["shape"][::-1] if rng.integers(0, 2) else [1, *entry["shape"]]
        elif kind == 4 and len(header) > 1:
            del header[name]
        elif kind == 5:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry.update(dtype="U8", shape=[size])
        else:
            config[str(rng.choice(KEYS))] = VALUES[int(rng.integers(0, len(VALUES)))]


@pytest.mark.parametrize("reader", READERS)
def test_a_mutation_is_refused_or_gives_columns(reader: str, tmp_path) -> None:
    tensors, config, _ = FORMATS[READERS[reader]][0](HIDDEN, WIDTH)
    rng, seen = np.random.default_rng(0), Counter[str]()
    path = tmp_path / "model.safetensors"
    for _ in range(MUTATIONS):
        header, data = file_of(tensors)
        changed = json.loads(json.dumps(config))
        mutate(header, data, changed, rng)
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
        files = local_files(tmp_path)
        try:
            site = SiteTensors(files, read_shards(files, "here").tensors, SITE, "here")
            found = quantised_at(site, Settings("here", HIDDEN, WIDTH, changed))
            if found is None:
                seen["of no format"] += 1
                continue
            columns = found.columns(16, 32)
            assert (columns.shape, columns.dtype) == ((HIDDEN, 32), torch.float64)
            seen["read"] += 1
        except fastlock.FastlockError as error:
            seen[type(error).__name__] += 1
    print(f"\n{reader}: {dict(seen)}")
    assert seen["read"]
    assert seen["DamagedError"]
