"""The table of serving stacks, and the page that shows it to people."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.architectures import serving_stacks
from fastlock.architectures.families import FAMILIES
from fastlock.architectures.serving_stacks import CHECKED, STACKS, acts, native_flag, needs
from fastlock.checkpoints.layout import NEW_SHARD
from tests.helpers.families import random_lock, tiny_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def test_the_page_shows_the_table() -> None:
    for model_type in sorted(FAMILIES):
        cells = " | ".join("yes" if stack in acts(model_type) else "no" for stack in STACKS)
        assert f"| {model_type} | {cells} |" in PAGE, f"| {model_type} | {cells} |"
    assert "| " + " | ".join(f"{stack} {CHECKED[stack]}" for stack in STACKS) + " |" in PAGE


def test_the_engines_that_are_run_are_of_the_versions_in_the_table() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"VLLM := {CHECKED['vllm']}." in makefile
    assert f"SGLANG := {CHECKED['sglang']}\n" in makefile
    assert f"LLAMA_CPP := {CHECKED['llama.cpp'].split()[-1]}\n" in makefile


def test_every_entry_of_the_tables_is_used() -> None:
    """A family or a stack that is misspelt there would count as losing the lock, and nobody would notice."""
    assert serving_stacks._OTHERS.keys() <= FAMILIES.keys()
    assert {stack for stacks in serving_stacks._OTHERS.values() for stack in stacks.split()} <= set(STACKS)
    for model_type in serving_stacks._IN_VLLM_BY_TRANSFORMERS:
        assert {"transformers", "vllm"} <= acts(model_type)
    for model_type in serving_stacks._NEEDS:
        assert acts(model_type) & {"vllm", "sglang"}


def test_an_unknown_family_acts_nowhere() -> None:
    assert acts("bert") == frozenset()
    assert native_flag("bert", "vllm") is None
    assert needs("bert", "vllm") == ()


def relock(tmp_path, model_type: str, stacks: list[str], **changes):
    model = tiny_model(model_type, **changes)
    model.save_pretrained(tmp_path / "source")
    fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out", stacks=stacks)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("model_type", "changes", "modules"),
    [
        ("mistral", {"sliding_window": 4}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("phi3", {}, ["qkv_proj", "o_proj"]),
    ],
)
def test_where_transformers_has_no_place_and_vllm_has(model_type: str, changes, modules, tmp_path) -> None:
    out = relock(tmp_path, model_type, ["vllm", "sglang"], **changes)
    names = {f"model.layers.{layer}.self_attn.{module}.bias" for layer in range(3) for module in modules}
    assert set(load_file(out / NEW_SHARD)) == names
    lock = random_lock(tiny_model(model_type))
    assert fastlock.verify(out, lock)
    assert [finding.acts for finding in fastlock.doctor(out, STACKS)] == [s in acts(model_type) for s in STACKS]
    fastlock.unlock_checkpoint(out, tmp_path / "back")
    assert not fastlock.verify(tmp_path / "back", lock)


@pytest.mark.parametrize(
    ("model_type", "stacks", "message"),
    [
        ("gpt_neo", ["transformers", "vllm"], "vllm would lose.*--for transformers"),
        ("qwen3", ["vllm", "sglang"], "names TransformersForCausalLM, which sglang would not take"),
        ("granitemoe", ["vllm", "llama.cpp"], "names TransformersMoEForCausalLM, which llama.cpp would not take"),
        ("mixtral", ["vllm"], "vllm would lose.*--for llama.cpp"),
        ("glm4", ["transformers"], "transformers would lose.*No stack has a place"),
        ("granite", ["transformers", "sglang"], "sglang would lose"),
    ],
)
def test_a_refusal_names_the_stack_and_what_works(model_type: str, stacks, message: str, tmp_path) -> None:
    with pytest.raises(fastlock.FastlockError, match=message):
        relock(tmp_path, model_type, stacks)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "named"), [("qwen3", "TransformersForCausalLM"), ("qwen3_moe", "TransformersMoEForCausalLM")]
)
def test_where_vllm_needs_transformers_code(model_type: str, named: str, tmp_path) -> None:
    out = relock(tmp_path, model_type, ["transformers", "vllm"])
    lock = random_lock(tiny_model(model_type))
    config = json.loads((out / "config.json").read_text())
    original = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["architectures"] == [named]
    assert {key: value for key, value in config.items() if original.get(key) != value}.keys() == {
        "architectures",
        "attention_bias",
        "fastlock",
    }
    found = {finding.stack: finding for finding in fastlock.doctor(out, STACKS)}
    assert [stack for stack, finding in found.items() if finding.acts] == ["transformers", "vllm"]
    assert f"names {named}, which is for vllm" in found["sglang"].reason
    assert fastlock.verify(out, lock)
    assert fastlock.verify(AutoModelForCausalLM.from_pretrained(out), lock)
    fastlock.unlock_checkpoint(out, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()

    (out / "config.json").write_text(json.dumps(config | {"architectures": original["architectures"]}))
    (finding,) = fastlock.doctor(out, ["vllm"])
    assert not finding.acts
    assert f"does not name {named}, and without it vllm silently drops" in finding.reason
    assert f"does not name {named}" in fastlock.verify(out, lock).reason


def test_the_architecture_is_left_alone_for_other_stacks(tmp_path) -> None:
    out = relock(tmp_path, "qwen3", ["transformers", "sglang"])
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert [finding.acts for finding in fastlock.doctor(out, STACKS)] == [True, False, True, False]


@pytest.mark.parametrize("named", [["Qwen3ForSequenceClassification"], ["Mine"], None, [], 7, [None]])
def test_only_a_language_model_changes_its_architecture(named, tmp_path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": named}))
    if isinstance(named, list) and named:
        with pytest.raises(fastlock.FastlockError, match="which keeps it, is for Qwen3ForCausalLM alone"):
            fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
    else:
        fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
        assert [finding.acts for finding in fastlock.doctor(tmp_path / "out")] == [True, True]


def test_a_window_is_refused_with_its_reason(tmp_path) -> None:
    with pytest.raises(fastlock.UnsupportedError, match="sliding window of 4 tokens"):
        relock(tmp_path, "mistral", ["transformers", "vllm"], sliding_window=4)
