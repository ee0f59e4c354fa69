"""Every reader of a quantised format against mutated tensors: an error of fastlock's, or columns of the right shape.

By default a few mutations each. `FASTLOCK_MUTATIONS=10000 pytest tests/checkpoints/quantised/test_mutations.py -s`
makes 10,000 of each, and prints how many were refused.
"""

from __future__ import annotations

import contextlib
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
KEYS = ("bits", "version", "checkpoint_format", "format", "weight_block_size", "config_groups", "group_size")
STATE_KEYS = ("blocksize", "nested_blocksize", "nested_offset", "shape", "quant_type", "dtype", "nested_dtype")
NUMBERS = (0, -1, 3, 4.0, 8, 8.0, 16, 64, 2**31, 2**40, 2**63, 10**400, 4.5, float("nan"), float("inf"), True, False)
GROUPS = [{"a": {"weights": value}} for value in ({"x": 1}, [1], "x", 5, {"block_structure": [1, 2**40]})]
VALUES = (*NUMBERS, "x", "", "4", None, [], {}, [128], [0, 0], [1, 2**40], [16, 64], [4], {"a": [], "b": {}}, *GROUPS)
DTYPES = (
    *("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "BOOL"),
    *("F8_E8M0", "F4", "C64", "F8_E4M3FNUZ", "X"),
)
# As four bytes: large numbers, negative ones, and the bits of infinity.
EXTREMES = (0, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000)
# Suffixes of all formats: of more than are there, the wrong one may be taken.
SUFFIXES = (
    *("weight", "qweight", "weight_packed", "scales", "qzeros", "g_idx", "weight_scale", "weight_scale_inv", "bias"),
    *("weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale", "weight_scale_2", "weight.SCB"),
    *("SCB", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight_format", "weight.nested_quant_map"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
)


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
    """One or two things are changed: bytes, a dtype, a shape, a name, which tensors there are, the config."""
    for _ in range(int(rng.integers(1, 3))):
        name = str(rng.choice(sorted(header)))
        entry, kind = header[name], int(rng.integers(0, 12))
        if kind == 0 and data:
            begin, end = entry["data_offsets"]
            for at in rng.integers(begin, max(end, begin + 1), 4):
                data[min(int(at), len(data) - 1)] = int(rng.integers(0, 256))
        elif kind == 1:
            entry["dtype"] = str(rng.choice(DTYPES))
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
        elif kind == 6:
            resize(header, data, name, rng)
        elif kind == 7:
            header[f"{SITE}.{rng.choice(SUFFIXES)}"] = header.pop(name) if rng.integers(0, 2) else entry.copy()
        elif kind == 8:
            entry["data_offsets"] = [end + int(rng.integers(-9, 9)) for end in entry["data_offsets"]]
        elif kind == 9 and ".quant_state." in "".join(header):
            change_state(header, data, rng)
        elif kind == 10 and entry["data_offsets"][0] + 4 <= entry["data_offsets"][1] <= len(data):
            begin, end = entry["data_offsets"]
            at = begin + 4 * int(rng.integers(0, (end - begin) // 4))
            data[at : at + 4] = int(rng.choice(EXTREMES)).to_bytes(4, "little")
        else:
            config[str(rng.choice(KEYS))] = VALUES[int(rng.integers(0, len(VALUES)))]


def resize(header: dict[str, Any], data: bytearray, name: str, rng: np.random.Generator) -> None:
    """A tensor is shorter or longer along one dimension, or has one less, and the file says so truthfully."""
    entry = header[name]
    shape, (begin, end) = list(entry["shape"]), entry["data_offsets"]
    numbers = int(np.prod(shape))
    if not numbers or not shape or begin < 0:
        return
    place, size = int(rng.integers(0, len(shape))), (end - begin) // numbers
    shape[place] = int(rng.choice([0, 1, shape[place] // 2, shape[place] + 1, 2 * shape[place], shape[place] - 1]))
    if shape[place] == 1 and rng.integers(0, 2):
        del shape[place]
    length = int(np.prod(shape)) * size
    entry.update(shape=shape, data_offsets=[len(data), len(data) + length])
    data += (bytes(data[begin:end]) * 3)[:length].ljust(length, b"\0")


def change_state(header: dict[str, Any], data: bytearray, rng: np.random.Generator) -> None:
    """The quant_state of bitsandbytes says something else, or is no JSON object any more."""
    name = next(name for name in header if ".quant_state." in name)
    begin, end = header[name]["data_offsets"]
    said: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):  # where it was changed before
        said = dict(json.loads(data[begin:end]))
    said |= {str(rng.choice(STATE_KEYS)): VALUES[int(rng.integers(0, len(VALUES)))]}
    encoded = json.dumps(said if rng.integers(0, 9) else [said]).encode()
    header[name] = {"dtype": "U8", "shape": [len(encoded)], "data_offsets": [len(data), len(data) + len(encoded)]}
    data += encoded


def packed(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The same tensors one after the other: what was taken out leaves no gap, which would be refused at once."""
    new, out = {}, b""
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        new[name] = entry | {"data_offsets": [len(out), len(out) + end - begin]}
        out += data[max(0, begin) : max(0, end)]
    return new, out


@pytest.mark.parametrize("reader", READERS)
def test_a_mutation_is_refused_or_gives_columns(reader: str, tmp_path) -> None:
    tensors, config, _ = FORMATS[READERS[reader]][0](HIDDEN, WIDTH)
    rng, seen = np.random.default_rng(0), Counter[str]()
    path = tmp_path / "model.safetensors"
    for _ in range(MUTATIONS):
        header, data = file_of(tensors)
        changed = json.loads(json.dumps(config))
        mutate(header, data, changed, rng)
        if rng.integers(0, 10):
            header, data = packed(header, bytes(data))
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
        files = local_files(tmp_path)
        try:
            site = SiteTensors(files, read_shards(files, "here").tensors, SITE, "here")
            found = quantised_at(site, Settings("here", HIDDEN, WIDTH, changed))
            if found is None:
                seen["of no format"] += 1
                continue
            columns = found.columns(16, 32)(slice(None))
            assert (columns.shape, columns.dtype) == ((HIDDEN, 32), torch.float64)
            seen["read"] += 1
        except fastlock.FastlockError as error:
            seen[type(error).__name__] += 1
    print(f"\n{reader}: {dict(seen)}")
    assert seen["read"]
    assert seen["DamagedError"]
