"""Quantised modules in memory, by their real libraries: relocked as the unfolded forward computes, or refused."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.errors import UnsupportedError
from fastlock.models.projections.bitsandbytes import Linear4bit as Projection4bit
from fastlock.models.sites import sites
from tests.checkpoints.quantised.test_formats import FORMATS
from tests.checkpoints.quantised.test_relocking import LAYERS, checkpoint, edit
from tests.helpers.families import EAGER, logits, random_lock, state, tiny_model, tokens

OTHERS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# The library dequantises the last two of compressed-tensors to bfloat16 alone.
IN_MEMORY = {"w4a16": "float32", "w8a8": "float32", "fp8 a row": "float32", "nvfp4": "bfloat16", "mxfp4": "bfloat16"}
IN_MEMORY |= {"nf4": "float32", "fp4": "float32", "int8": "float32"}


def load(tmp_path: Path, name: str, dtype: str = "float32") -> tuple[Any, fastlock.Lock, dict[int, torch.Tensor]]:
    """A checkpoint with quantised output projections as transformers loads it; its lock; W of each layer in float64."""
    source, lock, dense = checkpoint(tmp_path, FORMATS[name][0], dtype=getattr(torch, dtype))
    found = json.loads((source / "config.json").read_text())["quantization_config"]
    if found["quant_method"] == "compressed-tensors":
        (group,) = found["config_groups"].values()
        group = {"targets": ["re:.*o_proj"], "weights": group["weights"], "format": found["format"]}
        if name == "w8a8":
            group["input_activations"] = group["weights"] | {"dynamic": True, "strategy": "token"}
        found |= {"config_groups": {"group_0": group}, "quantization_status": "compressed", "ignore": ["lm_head"]}
    else:
        found |= {"llm_int8_skip_modules": OTHERS, "bnb_4bit_quant_type": name, "bnb_4bit_compute_dtype": dtype}
    edit(source, quantization_config=found)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **EAGER)
    return model.eval(), lock, dense


@contextlib.contextmanager
def unfolded(model: Any, dense: dict[int, torch.Tensor], lock: fastlock.Lock, strength: float) -> Iterator[None]:
    """W d added to what each locked projection gives out: by a hook, W from the format's own description."""
    hooks = []
    for layer in range(LAYERS):
        d, head_dim = torch.zeros(dense[layer].shape[1], dtype=torch.float64), lock.directions.shape[1]
        for i in (lock.layers == layer).nonzero().flatten().tolist():
            start = int(lock.heads[i]) * head_dim
            d[start : start + head_dim] = strength * float(lock.scales[i]) * lock.directions[i].double()
        shift = dense[layer] @ d
        module = model.model.layers[layer].self_attn.o_proj
        hooks.append(module.register_forward_hook(lambda _m, _i, y, shift=shift: (y.double() + shift).to(y.dtype)))
    yield
    for hook in hooks:
        hook.remove()


# Where bitsandbytes has a kernel for the CPU, it computes in bfloat16 whatever it is asked for, its scales rounded too.
BFLOAT16 = {"nvfp4", "mxfp4"} | ({"nf4", "fp4"} if has_avx512bf16() else set())

# The first forward pass changes the modules: once before relocking, once after it, of each library.
RUN_FIRST = ("w4a16", "nf4", "int8")
CASES = [(name, "relocked first") for name in IN_MEMORY] + [(name, "run first") for name in RUN_FIRST]


@pytest.mark.parametrize(("name", "first"), CASES)
def test_it_computes_as_the_unfolded_forward(name: str, first: str, tmp_path: Path) -> None:
    model, lock, dense = load(tmp_path, name, IN_MEMORY[name])
    if first == "run first":
        without = logits(model, tokens())
    receipt = fastlock.relock(model, lock, 6.0)
    with_lock = logits(model, tokens())
    again = logits(model, tokens())
    assert torch.equal(with_lock, again)
    assert fastlock.verify(model, lock), fastlock.verify(model, lock).reason
    assert fastlock.verify(model, lock).strength == 6.0
    assert receipt.to_dict()["weights_digest"]
    fastlock.unlock(model)
    assert all(site.module.bias is None for site in sites(model))
    if first == "run first":
        assert torch.equal(logits(model, tokens()), without)
    with unfolded(model, dense, lock, 6.0):
        expected = logits(model, tokens())
    without = logits(model, tokens())
    effect = float((expected - without).abs().max())
    assert effect > 0.5
    tolerance = 6e-2 if name in BFLOAT16 else 2e-3
    assert float((with_lock - expected).abs().max()) < tolerance * effect


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_own_order_for_a_cpu_is_read(kind: str, nested: bool) -> None:
    """Repacked by the library: the same numbers, with scales in bfloat16, to the bit."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_blockwise
    from bitsandbytes.nn import Linear4bit

    module = Linear4bit(128, 96, bias=False, compress_statistics=nested, quant_type=kind).to("cpu").eval()
    state, packed = module.weight.quant_state, module.weight.data.flatten().tolist()
    numbers = torch.tensor([half for byte in packed for half in (byte >> 4, byte & 15)]).view(-1, state.blocksize)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    expected = state.code.double()[numbers] * scales.bfloat16().double()[:, None]
    module.support_avx512bf16_for_cpu = True  # whatever this CPU is
    before = Projection4bit(module).matrix
    module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(module.weight.data, state)
    for found in (before, Projection4bit(module).matrix):
        assert found.dtype == torch.float64
        assert torch.equal(found, expected.view(96, 128))


@pytest.mark.parametrize("name", ["w4a16", "nf4", "int8"])
def test_in_bfloat16_the_bias_has_the_dtype_of_what_it_is_added_to(name: str, tmp_path: Path) -> None:
    model, lock, _ = load(tmp_path, name, "bfloat16")
    fastlock.relock(model, lock, 6.0)
    logits(model, tokens())
    biases = [site.module.bias for site in sites(model) if site.module.bias is not None]
    assert [bias.dtype for bias in biases] == [torch.bfloat16] * 2
    assert fastlock.verify(model, lock).strength == 6.0
    fastlock.relock(model, lock, 3.0)
    assert fastlock.verify(model, lock).strength == 3.0
    with fastlock.relocked(model, lock, 1.0):
        logits(model, tokens())
        assert fastlock.verify(model, lock).strength == 1.0
    assert fastlock.verify(model, lock).strength == 3.0
    fastlock.unlock(model)
    assert all(site.module.bias is None for site in sites(model))


@pytest.mark.parametrize("name", ["w4a16", "nf4", "int8"])
def test_a_bias_that_was_there_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, lock, _ = load(tmp_path, name)
    logits(model, tokens())  # in which compressed-tensors makes new parameters
    for site in sites(model):
        site.module.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    biases = [site.module.bias for site in sites(model)]
    kept, without = [bias.detach().clone() for bias in biases], logits(model, tokens())
    fastlock.relock(model, lock, 6.0)
    assert not torch.equal(biases[0], kept[0])
    logits(model, tokens())
    fastlock.unlock(model)
    assert all(site.module.bias is bias for site, bias in zip(sites(model), biases, strict=True))
    assert all(torch.equal(bias, before) for bias, before in zip(biases, kept, strict=True))
    assert torch.equal(logits(model, tokens()), without)


@pytest.mark.parametrize("name", ["w4a16", "fp8 a row", "nf4", "int8"])
def test_what_it_cannot_do_is_refused_and_says_what_can(name: str, tmp_path: Path) -> None:
    model, lock, _ = load(tmp_path, name)
    with pytest.raises(UnsupportedError, match="a plan would have to compute its weight each time"):
        fastlock.Plan([model], lock).relock()
    with pytest.raises(UnsupportedError, match="locks per request run plain linear layers alone"):
        fastlock.RequestLocks(model, [lock])
    assert all(site.module.bias is None for site in sites(model))
    fastlock.relock(model, lock)
    with pytest.raises(UnsupportedError, match=r"saving it would lose the lock.* relock the saved checkpoint on disk"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["w4a16", "nf4"])
def test_a_smoothed_one_is_told_by_the_norms_of_its_base(name: str, tmp_path: Path) -> None:
    model, lock, dense = load(tmp_path, name)
    head_dim = lock.directions.shape[1]
    norms = torch.stack(
        [
            dense[layer].norm(dim=0)[head * head_dim : (head + 1) * head_dim]
            for layer, head in zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)
        ]
    )
    fastlock.relock(model, replace(lock, column_norms=norms))
    fastlock.unlock(model)
    s = torch.exp(0.3 * torch.randn(norms.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(UnsupportedError, match="AWQ's smoothing"):
        fastlock.relock(model, replace(lock, column_norms=norms * s))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_lora_over_a_quantised_base(name: str, tmp_path: Path) -> None:
    """QLoRA: f = W d + s B A d, W the quantised base's, whether PEFT's layer computes it in two steps or not."""
    import peft

    model, lock, dense = load(tmp_path, name)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    without = model(tokens()).logits.detach()
    adapted = {}
    for layer in range(LAYERS):
        lora = model.base_model.model.model.layers[layer].self_attn.o_proj
        b, a = lora.lora_B["default"].weight.detach().double(), lora.lora_A["default"].weight.detach().double()
        adapted[layer] = dense[layer] + 3.0 * b @ a
    assert float((adapted[0] - dense[0]).abs().max()) > 0.05
    fastlock.relock(model, lock, 6.0)
    with_lock = model(tokens()).logits.detach()
    assert fastlock.verify(model, lock).strength == 6.0
    fastlock.unlock(model)
    assert torch.equal(model(tokens()).logits, without)
    with unfolded(model.base_model.model, adapted, lock, 6.0), torch.no_grad():
        expected = model(tokens()).logits
    effect = float((expected - without).abs().max())
    assert effect > 0.5
    tolerance = 6e-2 if name in BFLOAT16 else 2e-3
    assert float((with_lock - expected).abs().max()) < tolerance * effect


def test_a_relocked_quantised_checkpoint_is_known_when_it_is_loaded(tmp_path: Path) -> None:
    """Relocked on disk, loaded by transformers, verified and unlocked in memory."""
    for name in ("w4a16", "nf4"):
        directory = tmp_path / name
        directory.mkdir()
        unlocked, lock, _ = load(directory, name, "bfloat16")
        without = logits(unlocked, tokens())
        fastlock.relock_checkpoint(directory / "source", lock, directory / "out", 6.0)
        model = AutoModelForCausalLM.from_pretrained(directory / "out", dtype="auto", **EAGER).eval()
        fastlock.relock(unlocked, lock, 6.0)
        with_lock = logits(unlocked, tokens())
        effect = float((with_lock - without).abs().max())
        assert effect > 0.5
        tolerance = 6e-2 * effect if name in BFLOAT16 else 0.1
        assert float((logits(model, tokens()) - with_lock).abs().max()) < tolerance
        assert fastlock.verify(model, lock).strength == 6.0
        fastlock.unlock(model)
        fastlock.unlock(unlocked)
        assert torch.equal(logits(model, tokens()), logits(unlocked, tokens()))


def test_one_that_is_still_being_calibrated_is_refused(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationStatus

    model, lock, _ = load(tmp_path, "w8a8")
    module = sites(model)[0].module
    module.quantization_status = QuantizationStatus.FROZEN
    with pytest.raises(UnsupportedError, match="still being calibrated by compressed-tensors"):
        fastlock.relock(model, lock)
    module.quantization_status = QuantizationStatus.COMPRESSED
    module.quantization_scheme.output_activations = module.quantization_scheme.weights
    with pytest.raises(UnsupportedError, match="quantises what it gives out"):
        fastlock.relock(model, lock)


def test_bitsandbytes_before_it_quantises_is_refused() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model = tiny_model("llama")
    lock, attention = random_lock(model), model.model.layers[0].self_attn
    attention.o_proj = Linear4bit(128, 64, bias=False)
    with pytest.raises(UnsupportedError, match="is not quantised yet: bitsandbytes does that"):
        fastlock.relock(model, lock)
    attention.o_proj = Linear8bitLt(128, 64, bias=False, has_fp16_weights=True)
    with pytest.raises(UnsupportedError, match=r"anew in each forward pass \(has_fp16_weights\)"):
        fastlock.relock(model, lock)


class WQLinear_GEMM(nn.Module):  # noqa: N801
    """As AutoAWQ's: GPTQ's have the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(128, 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(4, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(4, 64, dtype=torch.float16))
        self.bias = None


class MarlinQuantLinear(WQLinear_GEMM):
    """As GPTQModel's."""


class RowParallelLinear(nn.Linear):
    """As an engine's, after its Marlin method repacked it."""

    def __init__(self) -> None:
        super().__init__(128, 64, bias=True)
        self.is_marlin_repacked = True


class FP8Linear(nn.Linear):
    """As transformers' for block scales, on a GPU."""

    def __init__(self) -> None:
        super().__init__(128, 64, bias=False)
        self.weight_scale_inv = nn.Parameter(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WQLinear_GEMM, "packed for a kernel of GPTQ or AWQ. Relock its checkpoint on disk"),
        (MarlinQuantLinear, "whose weight and bias Marlin keeps in an order of its own. Relock its checkpoint on disk"),
        (RowParallelLinear, "whose weight and bias Marlin keeps in an order of its own"),
        (FP8Linear, "quantised in a way that fastlock does not dequantise in memory"),
    ],
)
def test_modules_of_other_libraries_are_refused_by_name(cls: type[nn.Module], message: str) -> None:
    model = tiny_model("llama")
    lock = random_lock(model)
    model.model.layers[0].self_attn.o_proj = cls()
    before = state(model)
    for attempt in (lambda: fastlock.relock(model, lock), lambda: fastlock.verify(model, lock)):
        with pytest.raises(UnsupportedError, match=rf"o_proj is a .*{cls.__name__}, .*{message}"):
            attempt()
    assert state(model).keys() == before.keys()
    assert copy.deepcopy(model) is not None
