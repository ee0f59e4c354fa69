"""Gates in adapters: a LoRA of a checkpoint, or rows more in one that is there; it acts as unfolded, and comes out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model

import fastlock
from fastlock.checkpoints.adapters.adapter_files import JoinedFile, Piece
from fastlock.checkpoints.adapters.gate_lora import _alpha
from fastlock.locks.adapter_receipt import AdapterReceipt
from fastlock.models.unfolded import unfolded
from tests.helpers.adapters import base_model, config_of, loaded, rewrite_config, rewrite_tensors, save_adapter
from tests.helpers.families import gated_lock, logits, random_lock, tiny_gemma3, tiny_model, tokens
from tests.helpers.gated_adapters import gated_logits
from tests.helpers.quantised import gptq
from tests.helpers.relocked_adapters import adapted_logits, contents, quantised_base

STRENGTH, RANK = 1.5, 2
WEIGHTS = "adapter_model.safetensors"
ONE_RANK = ["sglang", "llama.cpp", "transformers"]
PATTERN = {
    "target_modules": r"model\.layers\.(0\.self_attn\.o_proj|\d\.mlp\.up_proj)",
    "exclude_modules": ["2.self_attn.o_proj"],
    "init_lora_weights": "orthogonal",
}


@pytest.fixture(scope="module")
def lock() -> fastlock.Lock:
    return gated_lock(tiny_model("llama"), rank=RANK, constant=False)


@pytest.fixture(scope="module")
def alone(base: Path, lock: fastlock.Lock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lock as an adapter by itself."""
    out = tmp_path_factory.mktemp("gates") / "alone"
    receipt = fastlock.relock_as_adapter(base, lock, out, STRENGTH)
    assert (receipt.carrier, receipt.rank, receipt.strength) == ("adapter gate", RANK, STRENGTH)
    return out


def near(found: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether the gate acts, and within the rounding of A and B."""
    effect = (truth - plain).abs().max()
    assert effect > 0.5
    return bool((found - truth).abs().max() < 3e-6 * effect)


def test_a_lora_of_a_checkpoint_acts_as_the_gate_does(base: Path, lock: fastlock.Lock, alone: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager").eval()
    plain = logits(model, tokens())
    with unfolded(model, lock, STRENGTH):
        truth = logits(model, tokens())
    assert (gated_logits(base, None, lock, STRENGTH) - truth).abs().max() < 1e-10
    assert near(adapted_logits(base, alone), truth, plain)
    found = fastlock.verify(alone, lock)
    assert (found.state, found.strength, found.layers) == ("locked", STRENGTH, (0, 2))


def test_it_touches_the_locked_projections_alone_and_reads_the_locked_heads_exactly(
    base: Path, lock: fastlock.Lock, alone: Path
) -> None:
    tensors, config = (
        safetensors.torch.load_file(alone / WEIGHTS),
        json.loads((alone / "adapter_config.json").read_text()),
    )
    paths = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 2)]
    assert config["target_modules"] == paths
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (RANK, RANK, {})
    assert tensors.keys() == {f"base_model.model.{path}.lora_{ab}.weight" for path in paths for ab in "AB"}
    adapted = [name for name, module in loaded(base, alone).named_modules() if hasattr(module, "lora_A")]
    assert adapted == [f"base_model.model.{path}" for path in paths]
    for layer, path in zip((0, 2), paths, strict=True):
        a = tensors[f"base_model.model.{path}.lora_A.weight"].view(RANK, 4, 32)
        b = tensors[f"base_model.model.{path}.lora_B.weight"]
        locked = {int(head): row for row, head in enumerate(lock.heads.tolist()) if lock.layers[row] == layer}
        for head in range(4):
            if head not in locked:
                assert not a[:, head].any()
        for j in range(RANK):
            ratios = {float(x) for head, row in locked.items() for x in (a[j, head] / lock.readers[row, j])}
            (ratio,) = ratios
            assert math.log2(ratio).is_integer()
            assert 0.5 <= a[j].abs().max() / b[:, j].abs().max() <= 2


# The adapter, what its config says besides, the stacks, and whether all of its modules must get one rank.
CARRIED: list[tuple[str, dict[str, Any], list[str], bool]] = [
    ("lora", {}, ["transformers", "vllm"], False),
    ("rslora", PATTERN, ["vllm"], False),
    ("patterns", {}, ["transformers", "vllm"], False),
    ("lora bias", {"target_modules": ["q_proj"]}, ["transformers"], False),
    ("lora", {"layers_to_transform": [0], "target_modules": ["o_proj", "q_proj"]}, ONE_RANK, True),
    ("rslora", {}, ["sglang"], True),
]


@pytest.mark.parametrize(("kind", "changes", "stacks", "one_rank"), CARRIED, ids=lambda value: str(value)[:20])
def test_a_lora_gets_the_gate_and_loses_it_again(
    kind: str, changes: dict[str, Any], stacks: list[str], one_rank: bool, base: Path, lock, tmp_path: Path
) -> None:
    source, out = save_adapter(config_of(kind, **changes), tmp_path / "adapter"), tmp_path / "out"
    before = contents(source)
    receipt = fastlock.relock_adapter(source, base, lock, out, STRENGTH, stacks=stacks)
    assert (receipt.carrier, receipt.rank, contents(source)) == ("adapter gate", RANK, before)
    assert near(adapted_logits(base, out), gated_logits(base, source, lock, STRENGTH), adapted_logits(base, source))
    assert fastlock.verify(out, lock).strength == STRENGTH
    assert all(finding.acts for finding in fastlock.doctor(out, stacks, base=base))
    tensors = safetensors.torch.load_file(out / WEIGHTS)
    locked = {site.name for site in receipt.sites}
    for key, tensor in safetensors.torch.load_file(source / WEIGHTS).items():
        now, own = tensors[key], tuple(slice(0, length) for length in tensor.shape)
        assert torch.equal(now[own], tensor)
        if key.removeprefix("base_model.model.").partition(".lora_")[0] not in locked:
            assert now.dtype == tensor.dtype
            assert now.shape == tensor.shape or (one_rank and now.count_nonzero() == tensor.count_nonzero())
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    config = json.loads((out / "adapter_config.json").read_text())
    assert not one_rank or (ranks == {4 + RANK} == {config["r"]} and not config["alpha_pattern"])
    fastlock.unlock_checkpoint(out, tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_a_relocked_adapter_is_relocked_anew_from_its_original(base: Path, lock, tmp_path: Path) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    fastlock.relock_adapter(source, base, lock, tmp_path / "once", 3.0)
    twice = fastlock.relock_adapter(tmp_path / "once", base, lock, tmp_path / "twice", 1.0)
    assert twice == fastlock.relock_adapter(source, base, lock, tmp_path / "direct", 1.0)
    assert contents(tmp_path / "twice") == contents(tmp_path / "direct")


def test_with_a_constant_part_besides_the_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    lock, source = gated_lock(tiny_model("llama")), save_adapter(config_of("lora"), tmp_path / "adapter")
    assert fastlock.relock_adapter(source, base, lock, tmp_path / "out", STRENGTH).carrier == "merge"
    merged: Any = loaded(base, source).merge_and_unload()
    plain = logits(merged, tokens())
    with unfolded(merged, lock, STRENGTH):
        truth = logits(merged, tokens())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64, attn_implementation="eager")
    assert near(logits(found.eval(), tokens()), truth, plain)


def test_the_numbers_of_a_bfloat16_lora_stay_and_the_gate_is_not_rounded_to_it(
    base: Path, lock, tmp_path: Path
) -> None:
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    rewrite_tensors(source, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    receipt = fastlock.relock_adapter(source, base, lock, tmp_path / "out", STRENGTH)
    before, after = (safetensors.torch.load_file(at / WEIGHTS) for at in (source, tmp_path / "out"))
    assert {after[key].dtype for key in after if "o_proj" in key and "layers.1" not in key} == {torch.float32}
    assert all(torch.equal(after[key], before[key]) for key in before if "q_proj" in key)
    assert {site.dtype for site in receipt.sites} == {"float32"}
    truth, plain = gated_logits(base, source, lock, STRENGTH), adapted_logits(base, source)
    assert near(adapted_logits(base, tmp_path / "out"), truth, plain)


def place(kind: str, directory: Path) -> nn.Module:
    """Save a model whose files name the projections otherwise than the model, or keep them transposed."""
    model = tiny_gemma3() if kind == "gemma3" else tiny_model("gpt2")
    if kind == "gpt2's inner model":
        inner = GPT2Model(model.config)
        inner.load_state_dict(model.transformer.state_dict())
        inner.save_pretrained(directory)
    else:
        model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "gpt2's inner model", "gemma3"])
def test_the_modules_are_called_as_the_model_calls_them(kind: str, tmp_path: Path) -> None:
    model = place(kind, tmp_path / "base").double().eval()
    lock = gated_lock(model, constant=False)
    fastlock.relock_as_adapter(tmp_path / "base", lock, tmp_path / "out", 1.0)
    plain = logits(model, tokens())
    with unfolded(model, lock, 1.0):
        truth = logits(model, tokens())
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out", autocast_adapter_dtype=False).double().eval()
    assert near(logits(adapted, tokens()), truth, plain)


def test_of_a_quantised_checkpoint_the_gate_is_that_of_what_its_numbers_stand_for(
    base: Path, lock, tmp_path: Path
) -> None:
    fastlock.relock_as_adapter(quantised_base(base, tmp_path / "gptq"), lock, tmp_path / "out", STRENGTH)
    tensors = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    dense = gptq(64, 128, seed=2)[2].double()
    gate = torch.zeros(RANK, 2, 128, dtype=torch.float64)
    row = lock.layers.tolist().index(2)
    at = slice(32 * int(lock.heads[row]), 32 * int(lock.heads[row]) + 32)
    gate[:, 0, at], gate[:, 1, at] = lock.readers[row], lock.writers[row]
    truth = sum(STRENGTH * torch.outer(dense @ u, v) for v, u in gate)
    name = "base_model.model.model.layers.2.self_attn.o_proj.lora_"
    found = tensors[f"{name}B.weight"].double() @ tensors[f"{name}A.weight"].double()
    assert (found - truth).abs().max() < 1e-6 * truth.abs().max()
    assert fastlock.verify(tmp_path / "out", lock)


@pytest.fixture(scope="module")
def within(base: Path, lock: fastlock.Lock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with the gate in it."""
    directory = tmp_path_factory.mktemp("within")
    source = save_adapter(config_of("lora"), directory / "adapter")
    fastlock.relock_adapter(source, base, lock, directory / "out", STRENGTH)
    return directory / "out"


def scaled(tensors: dict[str, torch.Tensor], layer: int, parameter: str, by: float, column: int) -> Any:
    key = f"base_model.model.model.layers.{layer}.self_attn.o_proj.{parameter}"
    changed = tensors[key].clone()
    part = changed[column] if parameter == "lora_A.weight" else changed[:, column]
    part[int(part.abs().argmax())] *= 1 + by
    return tensors | {key: changed}


@pytest.mark.parametrize(
    ("parameter", "by", "column", "state"),
    [
        ("lora_B.weight", 1e-7, 4, "locked"),
        ("lora_B.weight", 1e-5, 5, "altered"),
        ("lora_B.weight", 1e-6, 0, "altered"),
        ("lora_A.weight", 1e-6, 4, "altered"),
    ],
)
def test_what_is_off_by_more_than_its_rounding_is_found(
    parameter: str, by: float, column: int, state: str, within: Path, lock, tmp_path: Path
) -> None:
    shutil.copytree(within, tmp_path / "out")
    rewrite_tensors(tmp_path / "out", lambda tensors: scaled(tensors, 2, parameter, by, column))
    found = fastlock.verify(tmp_path / "out", lock)
    assert (found.state, found.altered) == (state, (2,) if state == "altered" else ())


def test_what_happened_since_is_found(within: Path, base: Path, lock, tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        shutil.copytree(within, tmp_path / name)
        return tmp_path / name

    found = fastlock.verify(rewrite_config(changed("alpha"), alpha_pattern={}), lock)
    assert (found.state, found.altered) == ("altered", (0, 2))
    other = base_model(tmp_path / "other", seed=9)
    assert "its base is not the one" in fastlock.verify(within, lock, base=other).reason
    assert "another lock" in fastlock.verify(within, random_lock(tiny_model("llama"))).reason
    (changed("pickled") / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.bin" in fastlock.verify(tmp_path / "pickled", lock).reason
    (changed("bare") / "fastlock.json").unlink()
    assert "no receipt" in fastlock.verify(tmp_path / "bare", lock, base=base).reason
    (changed("gone") / "fastlock" / "original" / WEIGHTS).unlink()
    with pytest.raises(fastlock.DamagedError, match="not what was set aside"):
        fastlock.verify(tmp_path / "gone", lock)
    with pytest.raises(fastlock.DamagedError, match="not what was set aside"):
        fastlock.unlock_checkpoint(tmp_path / "gone", tmp_path / "back")
    kept: Any = loaded(base, changed("kept")).float()
    kept.save_pretrained(tmp_path / "kept")
    assert (found := fastlock.verify(tmp_path / "kept", lock, base=base)), found
    assert "was saved anew since" in found.reason
    assert not (tmp_path / "back").exists()


def test_a_lock_alone_was_no_adapter_before(alone: Path, base: Path, lock, tmp_path: Path) -> None:
    for undo in (
        lambda: fastlock.unlock_checkpoint(alone, tmp_path / "out"),
        lambda: fastlock.relock_adapter(alone, base, lock, tmp_path / "out"),
    ):
        said = (
            rf"and was none before: .* make another one \(fastlock relock BASE .* --as adapter\); .* serve {base} alone"
        )
        with pytest.raises(fastlock.FastlockError, match=said):
            undo()
    assert not (tmp_path / "out").exists()
    stacks = ["transformers", "vllm", "sglang", "llama.cpp"]
    assert all(finding.acts for finding in fastlock.doctor(alone, stacks))


def test_doctor_tells_where_a_gate_acts_and_what_would_bring_one(
    within: Path, base: Path, lock, tmp_path: Path
) -> None:
    findings = fastlock.doctor(within, ["vllm", "sglang"], base=base)
    assert [finding.acts for finding in findings] == [True, False]
    assert "--for sglang" in findings[1].reason
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    (finding,) = fastlock.doctor(source, ["sglang"], base=base, lock=lock)
    assert finding.carriers[0] == "adapter gate"
    assert "off by" not in finding.reason


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("dora", {}, {"stacks": ["transformers"]}, "one with use_dora"),
    ("vera", {}, {"stacks": ["transformers"]}, "of the method VERA"),
    ("lora", {}, {"carrier": "adapter bias"}, "adapter bias: the lock has a gate"),
    ("lora", {}, {"carrier": "sidecar"}, "sidecar: the lock has a gate"),
    ("lora bias", {}, {"carrier": "adapter gate", "stacks": ["vllm"]}, "lora_bias = 'True'"),
    ("patterns", {}, {"carrier": "adapter gate", "stacks": ["sglang"]}, "has one s for all modules"),
    ("modules to save", {}, {"stacks": ["transformers"], "carrier": "adapter gate"}, "projections of its own"),
    ("lora", {"lora_alpha": 0}, {"carrier": "adapter gate"}, "scales layer 0 by 0"),
]


@pytest.mark.parametrize(("kind", "changes", "asked", "reason"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_no_gate_fits_into_is_refused(
    kind: str, changes: dict[str, Any], asked: dict[str, Any], reason: str, base: Path, lock, tmp_path: Path
) -> None:
    source = save_adapter(config_of(kind, **changes), tmp_path / "adapter")
    with pytest.raises(fastlock.UnsupportedError, match=reason):
        fastlock.relock_adapter(source, base, lock, tmp_path / "out", STRENGTH, **asked)
    assert not (tmp_path / "out").exists()


def test_locks_and_checkpoints_of_which_no_adapter_is_made(base: Path, lock, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny_model("llama")
    for other, reason in ((random_lock(model), "the lock has none"), (gated_lock(model), "has a constant part, too")):
        with pytest.raises(fastlock.UnsupportedError, match=reason):
            fastlock.relock_as_adapter(base, other, out)
    source = save_adapter(config_of("lora"), tmp_path / "adapter")
    with pytest.raises(fastlock.UnsupportedError, match="it brings a gate, and the lock has none"):
        fastlock.relock_adapter(source, base, random_lock(model), out, carrier="adapter gate")
    fastlock.relock_checkpoint(base, random_lock(model), tmp_path / "locked")
    with pytest.raises(fastlock.UnsupportedError, match="the base is relocked, and the lock would act twice"):
        fastlock.relock_as_adapter(tmp_path / "locked", lock, out)
    with pytest.raises(fastlock.FastlockError, match="the strength is too large"):
        fastlock.relock_as_adapter(base, lock, out, 1e80)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(fastlock.UnsupportedError, match="convert_lora_to_gguf"):
        fastlock.relock_as_adapter(tmp_path / "model.gguf", lock, out)
    assert not out.exists()


@pytest.mark.parametrize("change", [{"rank_pattern": {"o_proj": 3}}, {"lora_alpha": "x"}, {"r": 0}])
def test_a_config_that_does_not_go_with_its_tensors_is_refused(change, base: Path, lock, tmp_path: Path) -> None:
    source = rewrite_config(save_adapter(config_of("lora"), tmp_path / "adapter"), **change)
    with pytest.raises(fastlock.DamagedError):
        fastlock.relock_adapter(source, base, lock, tmp_path / "out", stacks=["sglang"])
    assert not (tmp_path / "out").exists()


def test_the_receipt_says_the_rank_and_is_read_strictly(alone: Path) -> None:
    data = json.loads((alone / "fastlock.json").read_text())
    assert (data["format_version"], data["rank"], data["original"]) == (2, RANK, {})
    assert AdapterReceipt.from_dict(data, "it").to_dict() == data
    for change in ({"carrier": "adapter bias"}, {"rank": 0}, {"format_version": 1}):
        with pytest.raises(fastlock.DamagedError):
            AdapterReceipt.from_dict(data | change, "it")


def test_an_alpha_gives_back_its_scale() -> None:
    for by_root in (False, True):
        for rank in range(1, 70):
            for scale in (2.0, 12 / 7, 1 / 3, 16 / math.sqrt(24), 0.1):
                given = _alpha(scale, rank, by_root) / (math.sqrt(rank) if by_root else rank)
                assert given == pytest.approx(scale, rel=3e-16)
    assert (_alpha(2.0, 9, False), type(_alpha(2.0, 9, False))) == (18, int)


def test_joined_pieces_are_read_as_one_file() -> None:
    data = [b"abc", b"", b"defgh", b"i"]
    file = JoinedFile([Piece(len(piece), lambda piece=piece: piece) for piece in data])
    whole = b"".join(data)
    assert (file.size, b"".join(file.parts())) == (len(whole), whole)
    for start in range(10):
        for length in range(11):
            assert file.read(start, length) == whole[start : start + length]


def test_a_gate_in_a_relocked_base_acts_under_adapters_that_leave_the_projections_alone(
    base: Path, lock, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    fastlock.relock_checkpoint(base, lock, locked, STRENGTH)
    for kind, state in (("elsewhere", "locked"), ("lora", "altered")):
        source = save_adapter(config_of(kind), tmp_path / kind)
        assert fastlock.verify(source, lock, base=locked).state == state
        (finding,) = fastlock.doctor(source, ["transformers"], base=locked, lock=lock)
        assert finding.acts == (state == "locked")
