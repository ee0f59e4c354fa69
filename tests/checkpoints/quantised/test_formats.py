"""Every quantised format: its columns are those of the weights that are served, and damaged tensors are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastlock
from fastlock.checkpoints.quantised import Settings, SiteTensors, quantised_at
from fastlock.checkpoints.tensor_index import read_shards
from fastlock.storage.local import local_files
from tests.helpers import quantised
from tests.helpers.quantised import Written

HIDDEN, WIDTH = 48, 192
SITE = "model.layers.0.self_attn.o_proj"
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "strategy": "channel", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}


def compressed(layout: str, **arguments) -> Callable[..., Written]:
    return partial(quantised.compressed, layout=layout, **arguments)


def changed(write: Callable[..., Written], change: Callable[[dict, dict], None]) -> Callable[..., Written]:
    """The same, with another change to the tensors and the config, which leaves the weights what they are."""

    def written(hidden: int, width: int, **options) -> Written:
        tensors, config, dense = write(hidden, width, **options)
        change(tensors, config)
        return tensors, config, dense

    return written


# With the difference that its oracle may have, relative to the largest weight: libraries round to float32, or less.
FORMATS: dict[str, tuple[Callable[..., Written], float]] = {
    "gptq": (quantised.gptq, 0),
    "gptq v2": (partial(quantised.gptq, version=2), 0),
    "gptq v2, said as transformers does": (
        changed(partial(quantised.gptq, version=2), lambda _, c: c.update(format=c.pop("checkpoint_format").upper())),
        0,
    ),
    "gptq act-order": (partial(quantised.gptq, act_order=True), 0),
    "gptq 8 bits": (partial(quantised.gptq, bits=8), 0),
    "gptq 2 bits": (partial(quantised.gptq, bits=2, group=64), 0),
    "gptq one group": (lambda h, w, **o: quantised.gptq(h, w, group=w, **o), 0),
    "awq": (quantised.awq, 0),
    "awq large groups": (partial(quantised.awq, group=64), 0),
    "block fp8": (quantised.block_fp8, 0),
    "block fp8, small blocks": (partial(quantised.block_fp8, block=(16, 64)), 0),
    "modelopt nvfp4": (quantised.modelopt_nvfp4, 1e-15),
    "w4a16": (compressed("pack-quantized", **INT4), 1e-6),
    "w4a16 asymmetric": (compressed("pack-quantized", **INT4 | {"symmetric": False}), 1e-6),
    "w8a16": (compressed("pack-quantized", **INT8), 1e-6),
    "w8a8": (compressed("int-quantized", **INT8), 1e-6),
    "fp8 a row": (compressed("float-quantized", strategy="channel", **FLOAT8), 1e-6),
    "fp8 a row, in one dimension": (
        changed(
            compressed("float-quantized", strategy="channel", **FLOAT8),
            lambda t, _: t.update(weight_scale=t["weight_scale"].flatten()),
        ),
        1e-6,
    ),
    "fp8": (compressed("float-quantized", strategy="tensor", **FLOAT8), 1e-6),
    "nvfp4": (compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **FLOAT4), 2**-8),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", strategy="group", group_size=32, scale_dtype="torch.uint8", **FLOAT4),
        2**-8,
    ),
    "nf4": (quantised.bits_and_bytes, 1e-6),
    "fp4": (partial(quantised.bits_and_bytes, kind="fp4"), 1e-6),
    "nf4, absmax in float32": (partial(quantised.bits_and_bytes, nested=False), 1e-6),
    "nf4, kept as bfloat16": (partial(quantised.bits_and_bytes, storage=torch.bfloat16), 1e-6),
    "int8": (quantised.llm_int8, 1e-3),  # the library dequantises to float16
}


def site_in(directory: Path, tensors: dict[str, torch.Tensor], config: dict, hidden: int, width: int):
    """The projection as fastlock finds it in a file, beside another tensor; and the tensors it read."""
    named = {f"{SITE}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file(named | {"model.norm.weight": torch.ones(7)}, directory / "model.safetensors")
    files = local_files(directory)
    tensors_of_site = SiteTensors(files, read_shards(files, "here").tensors, SITE, "here")
    return quantised_at(tensors_of_site, Settings("here", hidden, width, config)), tensors_of_site


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_those_of_the_dequantised_weight(name: str, tmp_path) -> None:
    write, tolerance = FORMATS[name]
    tensors, config, dense = write(HIDDEN, WIDTH)
    assert dense.shape == (HIDDEN, WIDTH)
    assert len(dense.unique()) > 10
    found, _ = site_in(tmp_path, tensors, config, HIDDEN, WIDTH)
    bound = tolerance * float(dense.abs().max())
    for first, count in ((0, WIDTH), (0, 16), (WIDTH - 16, 16), (80, 80), (64, 64), (33, 47), (5, 1)):
        columns = found.columns(first, count)
        for rows in (slice(None), slice(5, 40), slice(40, 99), slice(3, None, 8)):
            served = dense[rows, first : first + count]
            for _ in range(2):  # what was given is whoever's who asked for it
                numbers = columns(rows)
                assert (numbers.dtype, numbers.shape) == (torch.float64, served.shape)
                assert float((numbers - served).abs().max()) <= bound, (first, count, rows)
                numbers.fill_(torch.nan)


def test_every_nibble_and_zero_point_of_gptq_and_awq(tmp_path) -> None:
    """All 16 values against all zero points; the scale is 1."""
    for name, write, zeros in (
        ("v1", lambda: quantised.gptq(16, 16, group=16), range(1, 16)),
        ("v2", lambda: quantised.gptq(16, 16, group=16, version=2), range(16)),
        ("awq", lambda: quantised.awq(16, 16, group=16), range(16)),
    ):
        config = write()[1]
        for zero in zeros:
            values = torch.arange(16).repeat(16, 1).t()  # [width, hidden]: input i has the value i everywhere
            per_word = torch.arange(0, 32, 4)
            if name == "awq":
                words = [sum(i << int(s) for s in per_word) for i in range(16)]
                qweight = torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w] * 2 for w in words]).int()
            else:
                halves = [sum((8 * h + i) << int(s) for i, s in enumerate(per_word)) for h in range(2)]
                qweight = torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w] * 16 for w in halves]).int()
            kept = zero - (name == "v1")
            word = sum(kept << int(s) for s in per_word)
            qzeros = torch.full((1, 2), word - (1 << 32) if word >= 1 << 31 else word).int()
            made = {"qweight": qweight, "qzeros": qzeros, "scales": torch.ones(1, 16).half()}
            found, _ = site_in(tmp_path, made, config, 16, 16)
            assert torch.equal(found.columns(0, 16)(slice(None)), (values - zero).t().double()), (name, zero)


def test_a_zero_point_that_overflows_is_refused(tmp_path) -> None:
    """In version 1 a kept 15 means 16: some engines carry it into the next number."""
    tensors, config, _ = quantised.gptq(HIDDEN, WIDTH)
    tensors["qzeros"] |= 15
    found, _ = site_in(tmp_path, tensors, config, HIDDEN, WIDTH)
    with pytest.raises(fastlock.DamagedError, match="a zero point is 16, which does not fit"):
        found.columns(0, 16)


def test_only_the_bytes_of_the_columns_are_read(tmp_path) -> None:
    tensors, config, _ = quantised.gptq(HIDDEN, WIDTH)
    found, _ = site_in(tmp_path, tensors, config, HIDDEN, WIDTH)
    read = []
    file = found._tensors._files["model.safetensors"]
    original = file.read
    file.read = lambda start, length: read.append(length) or original(start, length)
    found.columns(64, 32)
    assert sum(read) == 32 // 8 * HIDDEN * 4 + HIDDEN * 2 + HIDDEN // 8 * 4


def test_the_digest_is_of_what_was_read(tmp_path) -> None:
    digests = []
    for change in ("nothing", "qweight", "scales", "elsewhere"):
        tensors, config, _ = quantised.gptq(HIDDEN, WIDTH)
        if change == "qweight":
            tensors["qweight"][1, 0] ^= 1
        if change == "scales":
            tensors["scales"][0, 5] += 1
        if change == "elsewhere":
            tensors["qweight"][-1, 0] ^= 1
        found, site = site_in(tmp_path, tensors, config, HIDDEN, WIDTH)
        found.columns(0, 16)
        digests.append(site.digest())
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def state(tensors: dict[str, torch.Tensor], **changes) -> None:
    """Change what the quant_state of bitsandbytes says."""
    name = "weight.quant_state.bitsandbytes__nf4"
    said = json.dumps(json.loads(bytes(tensors[name].tolist())) | changes)
    tensors[name] = torch.tensor(list(said.encode()), dtype=torch.uint8)


DAMAGES = {
    "another number of groups": (quantised.gptq, lambda t: t.update(scales=t["scales"][:-1].clone())),
    "scales of the wrong width": (quantised.gptq, lambda t: t.update(scales=t["scales"][:, :-1].clone())),
    "scales that are integers": (quantised.gptq, lambda t: t.update(scales=t["scales"].to(torch.int16))),
    "zeros of the wrong shape": (quantised.gptq, lambda t: t.update(qzeros=t["qzeros"][:, :-1].clone())),
    "no zeros": (quantised.awq, lambda t: t.update(qzeros=t["qzeros"][:0].clone())),
    "no groups": (quantised.awq, lambda t: t.update(qzeros=t["qzeros"][:0].clone(), scales=t["scales"][:0].clone())),
    "g_idx too large": (quantised.gptq, lambda t: t["g_idx"].fill_(99)),
    "g_idx below 0": (quantised.gptq, lambda t: t["g_idx"].fill_(-1)),
    "groups that do not divide": (
        quantised.awq,
        lambda t: t.update(qzeros=t["qzeros"][:5].clone(), scales=t["scales"][:5].clone()),
    ),
    "a block scale too few": (
        lambda h, w: quantised.block_fp8(h, w, block=(16, 64)),
        lambda t: t.update(weight_scale_inv=t["weight_scale_inv"][:2].clone()),
    ),
    "a block scale of three dimensions": (
        quantised.block_fp8,
        lambda t: t.update(weight_scale_inv=t["weight_scale_inv"][None, None].clone()),
    ),
    "another shape": (FORMATS["w4a16"][0], lambda t: t["weight_shape"].add_(1)),
    "packed otherwise": (FORMATS["w4a16"][0], lambda t: t.update(weight_packed=t["weight_packed"][:, :-1].clone())),
    "fp4 scales of the wrong shape": (
        quantised.modelopt_nvfp4,
        lambda t: t.update(weight_scale=t["weight_scale"][:, 1:].clone()),
    ),
    "half an nf4 weight": (quantised.bits_and_bytes, lambda t: t.update(weight=t["weight"][1:].clone())),
    "an absmax too few": (
        quantised.bits_and_bytes,
        lambda t: t.update({"weight.absmax": t["weight.absmax"][1:].clone()}),
    ),
    "a state that is not JSON": (
        quantised.bits_and_bytes,
        lambda t: t.update({"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
    ),
    "int8 in tiles": (quantised.llm_int8, lambda t: t["weight_format"].fill_(2)),
    "int8 in many tiles": (quantised.llm_int8, lambda t: t.update(weight_format=torch.zeros(9, dtype=torch.uint8))),
    "int8 in true tiles": (quantised.llm_int8, lambda t: t.update(weight_format=torch.tensor(False))),
    "an offset that overflows": (quantised.bits_and_bytes, lambda t: state(t, nested_offset=10**400)),
    "an offset that is none": (quantised.bits_and_bytes, lambda t: state(t, nested_offset=float("nan"))),
    "a block size beyond all": (quantised.bits_and_bytes, lambda t: state(t, blocksize=2**63)),
    "blocks of blocks beyond all": (quantised.bits_and_bytes, lambda t: state(t, nested_blocksize=2**63)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_tensors_that_do_not_go_together_are_refused(name: str, tmp_path) -> None:
    write, damage = DAMAGES[name]
    tensors, config, _ = write(HIDDEN, WIDTH)
    damage(tensors)
    with pytest.raises(fastlock.DamagedError, match=SITE):
        site_in(tmp_path, tensors, config, HIDDEN, WIDTH)


@pytest.mark.parametrize(
    ("write", "config"),
    [
        *((quantised.gptq, {"bits": bits}) for bits in (3, "four", 4.0, [4])),
        *((quantised.gptq, {key: name}) for key in ("checkpoint_format", "format") for name in ("marlin", 0, [])),
        *((quantised.awq, {"bits": 8}), (quantised.awq, {"version": "gemv"}), (quantised.awq, {"version": 0})),
        (changed(quantised.awq, lambda _, c: c.pop("version")), {"format": "gemv"}),
        (quantised.block_fp8, {"weight_block_size": [128.0, 128]}),
        (quantised.block_fp8, {"weight_block_size": None, "config_groups": {"a": {"weights": {"block_structure": 3}}}}),
    ],
)
def test_variants_that_are_not_read_are_refused(write, config: dict, tmp_path) -> None:
    tensors, described, _ = write(HIDDEN, WIDTH)
    with pytest.raises(fastlock.UnsupportedError, match="fastlock reads"):
        site_in(tmp_path, tensors, described | config, HIDDEN, WIDTH)


@pytest.mark.parametrize("weights", [5, "x", [1], True, None, {}])
def test_groups_that_say_nothing_of_blocks_are_passed_over(weights, tmp_path) -> None:
    tensors, config, _ = quantised.block_fp8(HIDDEN, WIDTH)
    told = config | {"weight_block_size": None, "config_groups": {"a": {"weights": weights}, "b": 3}}
    assert site_in(tmp_path, tensors, told, HIDDEN, WIDTH)[0] is not None


def test_a_plain_weight_is_none_of_them(tmp_path) -> None:
    assert site_in(tmp_path, {"weight": torch.randn(HIDDEN, WIDTH)}, {}, HIDDEN, WIDTH)[0] is None


_MADE: dict[str, Written] = {}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_header_or_tensor_gives_an_error_of_ours_or_finite_work(data, tmp_path) -> None:
    """Shapes and dtypes of one tensor are replaced by others of as many bytes, and bytes are flipped."""
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    if name not in _MADE:
        _MADE[name] = FORMATS[name][0](16, 64) if "one group" not in name else quantised.gptq(16, 64, group=64)
    tensors, config, _ = _MADE[name]
    tensors = dict(tensors)
    suffix = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[suffix].contiguous().flatten().view(torch.uint8).clone()
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    dtype = data.draw(
        st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32, torch.int64])
    )
    if len(raw) % dtype.itemsize == 0:
        flat = raw.view(dtype)
        rows = data.draw(st.sampled_from([n for n in range(1, len(flat) + 1) if len(flat) % n == 0]))
        tensors[suffix] = data.draw(st.sampled_from([flat, flat.view(rows, -1), flat.view(rows, -1, 1)]))
    if data.draw(st.booleans()):
        config = config | {data.draw(st.sampled_from(["bits", "version", "weight_block_size", "config_groups"])): "x"}
    try:
        found, _ = site_in(tmp_path, tensors, config, 16, 64)
        if found is not None:
            assert found.columns(16, 16)(slice(None)).shape == (16, 16)
    except fastlock.FastlockError:
        pass
