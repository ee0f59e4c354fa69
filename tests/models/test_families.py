"""Every supported family: exact against the unfolded forward, bit-exact unlock, and nothing lost in saving."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastlock
from fastlock.architectures.families import FAMILIES, REFUSED
from fastlock.models import unfolded
from fastlock.models.sites import sites
from tests.helpers.families import (
    CONFIGS,
    logits,
    random_lock,
    reload,
    same_state,
    state,
    tiny_config,
    tiny_gemma3,
    tiny_model,
    tokens,
)

# How far a float64 model may be from the unfolded forward, in units of what the lock changes. Norms and softmax
# compute in float32 inside, so that a difference in the last bit of float64 can grow to one of float32.
EXACT = 1e-5

DROPS_THE_BIAS = {model_type for model_type, family in FAMILIES.items() if family.bias_flag is None}
LLAMA_FORM = {"mistral", "qwen2"}

every_family = pytest.mark.parametrize("model_type", sorted(CONFIGS))


def test_every_supported_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@every_family
def test_relocked_is_the_unfolded_forward_at_every_position(model_type: str) -> None:
    model = tiny_model(model_type, torch.float64)
    lock, ids = random_lock(model), tokens()
    plain = logits(model, ids)
    with unfolded.unfolded(model, lock, 3.0):
        expected = logits(model, ids)
    fastlock.relock(model, lock, 3.0)
    effect = (expected - plain).abs().amax(dim=-1)
    assert (effect > 1e-3).all(), "the lock must act at every position for this test to mean anything"
    assert ((logits(model, ids) - expected).abs().amax(dim=-1) < EXACT * effect).all()


@every_family
def test_relocked_is_the_unfolded_forward_in_generate_with_a_cache(model_type: str) -> None:
    model = tiny_model(model_type, torch.float64)
    lock, ids = random_lock(model), tokens(6)
    how = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "use_cache": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with unfolded.unfolded(model, lock, 3.0):
        expected = model.generate(ids, **how)
    fastlock.relock(model, lock, 3.0)
    got = model.generate(ids, **how)
    assert torch.equal(got.sequences, expected.sequences)
    for step, reference_step in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, reference_step, rtol=EXACT, atol=EXACT)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unlock_restores_every_bit(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    lock = random_lock(model)
    before, missing = state(model), [site.layer for site in sites(model) if site.bias is None]
    classes = [type(model), type(model.config)]
    fastlock.relock(model, lock)
    assert not same_state(before, state(model))
    fastlock.unlock(model)
    assert same_state(before, state(model))
    assert [site.layer for site in sites(model) if site.bias is None] == missing
    assert [type(model), type(model.config)] == classes


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_lost_in_saving(model_type: str, dtype: torch.dtype, tmp_path) -> None:
    model = tiny_model(model_type, dtype)
    lock, ids = random_lock(model), tokens()
    plain = logits(model, ids)
    fastlock.relock(model, lock)
    expected = logits(model, ids)
    assert not torch.equal(plain, expected)
    if model_type in DROPS_THE_BIAS - LLAMA_FORM:
        with pytest.raises(fastlock.UnsupportedError, match="no place for an output projection bias.*What works"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    model.save_pretrained(tmp_path / "out")
    loaded = reload(tmp_path / "out")
    assert torch.equal(logits(loaded, ids), expected)
    assert fastlock.verify(tmp_path / "out", lock)
    assert fastlock.verify(loaded, lock)
    fastlock.unlock(loaded)
    assert torch.equal(logits(loaded, ids), plain)
    assert not fastlock.verify(loaded, lock)


@pytest.mark.parametrize(
    "model_type", sorted(model_type for model_type, family in FAMILIES.items() if family.bias_flag)
)
def test_nothing_is_lost_with_the_bias_flag_the_other_way(model_type: str, tmp_path) -> None:
    """A Llama with biases of its own, a StarCoder2 without: what the flag also switches must come back as it was."""
    flag = FAMILIES[model_type].bias_flag
    other_way = not getattr(tiny_config(model_type), flag)
    model = tiny_model(model_type, **{flag: other_way})
    assert all((site.bias is not None) == other_way for site in sites(model))
    lock, ids, before = random_lock(model), tokens(), state(model)
    plain = logits(model, ids)
    fastlock.relock(model, lock)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = reload(tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    assert fastlock.verify(tmp_path, lock)
    fastlock.unlock(loaded)
    assert torch.equal(logits(loaded, ids), plain)
    assert same_state(state(loaded), before)


VARIANTS = [
    ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"alibi": True}),
    ("falcon", {"parallel_attn": False, "bias": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("cohere", {"use_qk_norm": True}),
    ("opt", {"do_layer_norm_before": False}),
    ("stablelm", {"use_qkv_bias": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=str)
def test_variants_of_a_family_are_exact(model_type: str, changes: dict, tmp_path) -> None:
    model = tiny_model(model_type, torch.float64, **changes)
    lock, ids = random_lock(model), tokens()
    plain = logits(model, ids)
    with unfolded.unfolded(model, lock, 3.0):
        expected = logits(model, ids)
    fastlock.relock(model, lock, 3.0)
    assert (logits(model, ids) - expected).abs().max() < EXACT * (expected - plain).abs().max()


@pytest.mark.parametrize("model_type", sorted(DROPS_THE_BIAS))
def test_the_table_is_right_about_who_drops_the_bias(model_type: str, tmp_path) -> None:
    model = tiny_model(model_type)
    for site in sites(model):
        site.module.bias = torch.nn.Parameter(torch.randn(len(site.weight)))
    model.save_pretrained(tmp_path)
    assert all(site.bias is None for site in sites(reload(tmp_path)))


def test_gemma3_with_its_vision_tower(tmp_path) -> None:
    model = tiny_gemma3(torch.float64)
    lock, ids = random_lock(model), tokens()
    plain = logits(model, ids)
    with unfolded.unfolded(model, lock, 3.0):
        expected = logits(model, ids)
    fastlock.relock(model, lock, 3.0)
    got = logits(model, ids)
    assert (got - expected).abs().max() < EXACT * (expected - plain).abs().max()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(logits(loaded, ids), got, rtol=EXACT, atol=EXACT)
    assert fastlock.verify(tmp_path, lock)


REFUSED_CONFIGS = {
    "bitnet": {},
    "diffllama": {},
    "deepseek_v3": {"kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 4, "moe_intermediate_size": 16},
    "qwen3_next": {"num_experts": 4, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("model_type", sorted(REFUSED_CONFIGS))
def test_refused_families_say_why(model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        **REFUSED_CONFIGS[model_type],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lock = random_lock(model, [(0, 0)])
    with pytest.raises(fastlock.UnsupportedError, match="head|attention") as error:
        fastlock.relock(model, lock)
    assert REFUSED[model_type] in str(error.value)


def test_an_unknown_family_is_refused() -> None:
    config = AutoConfig.for_model("biogpt", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(fastlock.UnsupportedError, match="does not know"):
        fastlock.relock(model, random_lock(model, [(0, 0)]))


def test_bloom_that_leaves_out_the_bias_is_refused() -> None:
    model = tiny_model("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(fastlock.UnsupportedError, match="slow_but_exact"):
        fastlock.relock(model, random_lock(model))


@pytest.mark.parametrize("tokens_seen", [4, 64, 4096])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_the_llama_form_is_refused_under_a_sliding_window(model_type: str, tokens_seen: int, tmp_path) -> None:
    """However long: positions may go beyond max_position_embeddings, with or without scaled RoPE."""
    window = {"sliding_window": tokens_seen, "use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(model_type, **window)
    fastlock.relock(model, random_lock(model))
    with pytest.raises(fastlock.UnsupportedError, match=f"sliding window of {tokens_seen} tokens"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_documented_table_is_the_real_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| **")]
    names = [set(re.findall(r"[a-z][a-z0-9_]+", families)) for _, _, families, _ in rows]
    documented = [{f"{name}_text" if name == "gemma3" else name for name in row} & set(FAMILIES) for row in names]
    flagged = {model_type for model_type, family in FAMILIES.items() if family.bias_flag}
    always = {model_type for model_type, family in FAMILIES.items() if family.bias_flag == ""}
    assert documented == [flagged, always, LLAMA_FORM, DROPS_THE_BIAS - LLAMA_FORM]
